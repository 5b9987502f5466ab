"""The published archive in its forms, with tiny synthetic content; hostile pickles and tars; the download."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.data.sources import download, locate, open_source
from pairclip_fast.data.sources.cifar100 import ARCHIVE_MD5, read_cifar100
from pairclip_fast.data.sources.pickles import RememberedArray, RememberedDtype, load_pickle
from pairclip_fast.data.tar import stream_members
from pairclip_fast.errors import DataError, EnvironmentLackingError

NAMES = ["apple", "aquarium_fish", "baby"]
ROWS = {"train": 30, "test": 6}


def pixels(part: str) -> np.ndarray:
    return np.random.default_rng(len(part)).integers(0, 256, (ROWS[part], 3072), dtype=np.uint8)


def labels(part: str) -> list[int]:
    return [k % 3 for k in range(ROWS[part])]


def python_files(protocol: int = 2, *, text_keys: bool = False) -> dict[str, bytes]:
    """As published: pickles of dicts with byte keys (or text keys, as Python 3 writes)."""

    def key(name: str) -> Any:
        return name if text_keys else name.encode()

    files = {
        part: pickle.dumps(
            {key("data"): pixels(part), key("fine_labels"): labels(part), key("filenames"): [b"x.png"] * ROWS[part]}, protocol=protocol
        )
        for part in ROWS
    }
    names = [name if text_keys else name.encode() for name in NAMES]
    return files | {"meta": pickle.dumps({key("fine_label_names"): names}, protocol=protocol)}


def binary_files() -> dict[str, bytes]:
    files = {
        f"{part}.bin": b"".join(bytes([19, label]) + row.tobytes() for label, row in zip(labels(part), pixels(part), strict=True))
        for part in ROWS
    }
    return files | {"fine_label_names.txt": "\n".join(NAMES).encode() + b"\n"}


def archive(path: Path, files: dict[str, bytes], folder: str, kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=kind) as opened:
        opened.addfile(_folder(folder))
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def unpacked(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "python tar.gz": lambda p: archive(p / "cifar-100-python.tar.gz", python_files(), "cifar-100-python"),
    "python tar": lambda p: archive(p / "cifar-100-python.tar", python_files(), "cifar-100-python"),
    "python pax": lambda p: archive(p / "other.tar.gz", python_files(), "n\u00e4me", tarfile.PAX_FORMAT),
    "python gnu": lambda p: archive(p / "other.tgz", python_files(), "folder", tarfile.GNU_FORMAT),
    "python folder": lambda p: unpacked(p / "cifar-100-python", python_files()),
    "python 3 pickles": lambda p: unpacked(p / "cifar-100-python", python_files(4, text_keys=True)),
    "python 3 protocol 2": lambda p: unpacked(p / "cifar-100-python", python_files(2, text_keys=True)),
    "binary tar.gz": lambda p: archive(p / "cifar-100-binary.tar.gz", binary_files(), "cifar-100-binary"),
    "binary folder": lambda p: unpacked(p / "cifar-100-binary", binary_files()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_the_same_images(tmp_path: Path, events: Any, form: str) -> None:
    path = FORMS[form](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert locate("auto", path=path, test_path=None, events=events).path == path
    sources = open_source("cifar100", path=path, test_path=None, seed=0, on_bad="raise", events=events)
    assert sources.test is not None
    for part, images in (("train", sources.train), ("test", sources.test)):
        assert (images.images == pixels(part).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).all()
        assert images.labels.tolist() == labels(part)
        assert images.class_names == ("apple", "aquarium fish", "baby")
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_the_archive_makes_a_test_split(tmp_path: Path, shard: Callable[..., dict[str, Any]]) -> None:
    summary = shard(source="cifar100", path=FORMS["binary folder"](tmp_path))
    assert {name: split["images"] for name, split in summary["splits"].items()} == {"train": 27, "val": 3, "test": 6}


def test_a_published_name_without_the_published_content_is_noted(tmp_path: Path, events: Any) -> None:
    read_cifar100(FORMS["python tar.gz"](tmp_path), size=32, on_bad="raise", events=events)
    assert "not the published archive" in events.messages()


def test_the_checksum_is_the_one_torchvision_publishes() -> None:
    specification = importlib.util.find_spec("torchvision")
    if specification is None or specification.origin is None:
        pytest.skip("torchvision is not installed")
    text = (Path(specification.origin).parent / "datasets" / "cifar.py").read_text()
    assert f'url = "{download.URL}"' in text
    assert f'tgz_md5 = "{ARCHIVE_MD5[download.NAME]}"' in text


def test_other_tile_sizes_are_resized_and_said(tmp_path: Path, events: Any) -> None:
    train, _ = read_cifar100(FORMS["binary folder"](tmp_path), size=16, on_bad="raise", events=events)
    assert train.images.shape == (30, 16, 16, 3)
    assert "resized" in events.messages()


# --- damage and malice ----------------------------------------------------------------------------------------------


class Hostile:
    """A pickle that touches a file when loaded by `pickle`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path, events: Any) -> None:
    canary = tmp_path / "canary"
    for name in ("train", "meta"):
        files = python_files()
        files[name] = pickle.dumps({b"data": Hostile(canary)}, protocol=2)
        path = unpacked(tmp_path / f"hostile-{name}", files)
        with pytest.raises(DataError, match="hostile") as caught:
            read_cifar100(path, size=32, on_bad="raise", events=events)
        assert "getattr" in str(caught.value)
        assert not canary.exists()
    pickle.loads(files["meta"])  # the control: the pickle is indeed loaded
    assert canary.exists()


def global_pickle(module: str, name: str, arguments: bytes = b"(t") -> bytes:
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "fromfile"),
        ("numpy", "load"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_no_name_but_the_five_is_known(module: str, name: str) -> None:
    with pytest.raises(DataError, match=name):
        load_pickle(global_pickle(module, name), where="x")


def test_stand_ins_allocate_nothing() -> None:
    arguments = b"(cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01bt"
    array = load_pickle(global_pickle("numpy.core.multiarray", "_reconstruct", arguments), where="x")
    assert isinstance(array, RememberedArray)
    with pytest.raises(DataError):
        array.rows(3072, where="x")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((30, 3072), dtype=np.float32),
        np.zeros((30, 3071), dtype=np.uint8),
        np.zeros(3072, dtype=np.uint8),
        np.asfortranarray(np.zeros((30, 3072), dtype=np.uint8)),
        np.array([[object()] * 2], dtype=object),
        "text",
        None,
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, events: Any, array: Any) -> None:
    files = python_files() | {"train": pickle.dumps({b"data": array, b"fine_labels": labels("train")}, protocol=2)}
    with pytest.raises(DataError):
        read_cifar100(unpacked(tmp_path / "cifar-100-python", files), size=32, on_bad="raise", events=events)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({b"data": pixels("train")}, "fine_labels"),
        ({b"data": pixels("train"), b"fine_labels": [0, 1]}, "differ in number"),
        ({b"data": pixels("train"), b"fine_labels": ["0"] * 30}, "no list of integers"),
        ({b"data": pixels("train"), b"fine_labels": [3] * 30}, "out of range"),
        ({b"data": pixels("train"), b"fine_labels": [-1] + [0] * 29}, "out of range"),
        ({b"data": pixels("train"), b"fine_labels": [0, 1] * 15}, "without images"),
        ({b"data": pixels("train")[:0], b"fine_labels": []}, "empty"),
        ([], "no `data`"),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, events: Any, found: Any, words: str) -> None:
    files = python_files() | {"train": pickle.dumps(found, protocol=3)}
    with pytest.raises(DataError, match=words):
        read_cifar100(unpacked(tmp_path / "cifar-100-python", files), size=32, on_bad="raise", events=events)


@pytest.mark.parametrize("spoiled", [binary_files() | {"fine_label_names.txt": b"apple\nf\xfcsh\nbaby\n"}, None], ids=["binary", "python"])
def test_class_names_that_are_not_utf_8_are_refused(tmp_path: Path, events: Any, spoiled: dict[str, bytes] | None) -> None:
    files = spoiled or python_files() | {"meta": pickle.dumps({b"fine_label_names": [b"apple", b"f\xfcsh", b"baby"]}, protocol=2)}
    with pytest.raises(DataError, match="not UTF-8"):
        read_cifar100(unpacked(tmp_path / "files", files), size=32, on_bad="raise", events=events)


def test_a_shape_that_is_none_is_not_written_out() -> None:
    """Tuples within tuples are small in a pickle, and twice as long as text with every level."""
    shape: tuple[Any, ...] = ()
    for _ in range(16):
        shape = (shape, shape)
    array = RememberedArray()
    for wrong, shown in ((shape, None), ((1, 10**5_000), None), ((1, 2), (1, 2))):
        array.__setstate__((1, wrong, RememberedDtype("u1"), False, b"12"))
        with pytest.raises(DataError) as caught:
            array.rows(3072, where="x")
        assert caught.value.got == shown


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_fuzzed_pickles_raise_only_our_error(position: int, junk: bytes) -> None:
    whole = python_files()["meta"]
    position %= len(whole)
    with contextlib.suppress(DataError):
        load_pickle(whole[:position] + junk + whole[position + len(junk) :], where="x")


@pytest.mark.parametrize("place", [b"r\xff\xff\xff\x00", b"p16777215\n", b"q\x09"], ids=["LONG_BINPUT", "PUT", "BINPUT"])
def test_a_place_far_away_is_refused_before_memory_is_taken_for_it(place: bytes) -> None:
    """Python would make 268 MB of table for these; for the largest number 64 GB, which ends the process."""
    near = b"\x80\x02]q\x00."
    assert load_pickle(near, where="x") == []
    with pytest.raises(DataError, match="place"):
        load_pickle(near.replace(b"q\x00", place), where="x")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_keep_their_objects_near(protocol: int) -> None:
    names = [f"name_{number}.png".encode() for number in range(3_000)]
    found = {b"fine_labels": list(range(3_000)), b"filenames": [*names, names], b"again": names}
    assert load_pickle(pickle.dumps(found, protocol=protocol), where="x") == found


def test_truncated_archives_and_records(tmp_path: Path, events: Any) -> None:
    path = FORMS["python tar.gz"](tmp_path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_cifar100(path, size=32, on_bad="raise", events=events)
    folder = unpacked(tmp_path / "cifar-100-binary", binary_files() | {"train.bin": binary_files()["train.bin"][:-1]})
    with pytest.raises(DataError, match="whole number of records"):
        read_cifar100(folder, size=32, on_bad="raise", events=events)
    (folder / "test.bin").unlink()
    with pytest.raises(DataError, match="incomplete"):
        read_cifar100(folder, size=32, on_bad="raise", events=events)
    other = archive(tmp_path / "other.tar.gz", {"x": b""}, "y")
    with pytest.raises(DataError, match="no CIFAR-100 archive"):
        read_cifar100(other, size=32, on_bad="raise", events=events)


def test_links_in_an_archive_are_passed_over(tmp_path: Path, events: Any) -> None:
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        for name in ("train", "test", "meta"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            opened.addfile(info)
    with pytest.raises(DataError, match="none of them"):
        read_cifar100(path, size=32, on_bad="raise", events=events)


class Zeros(io.RawIOBase):
    """An endless stream, as a decompressed bomb is."""

    def __init__(self, start: bytes) -> None:
        self.start, self.given = start, 0

    def read(self, size: int = -1) -> bytes:
        piece, self.start = self.start[:size], self.start[size:]
        self.given += size
        return piece + bytes(size - len(piece))


def test_a_compressed_bomb_is_given_up() -> None:
    info = tarfile.TarInfo("filler")
    info.size = 8**11 - 1
    stream = Zeros(info.tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(DataError, match="larger than any published one"):
        stream_members(stream, {"train"}, where="x", max_total=1 << 20)
    assert stream.given <= 1 << 20


def test_a_file_twice_is_refused() -> None:
    def member(name: str) -> bytes:
        return tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)

    with pytest.raises(DataError, match="twice"):
        stream_members(io.BytesIO(member("a/train") + member("b/train") + bytes(1024)), {"train", "test"}, where="x", max_total=1 << 20)


# --- download -------------------------------------------------------------------------------------------------------


def server(data: bytes) -> Callable[[str], Any]:
    return lambda url: io.BytesIO(data)


def test_a_download_is_verified_and_kept(tmp_path: Path, events: Any) -> None:
    data = gzip.compress(b"archive")
    md5 = hashlib.md5(data).hexdigest()
    path = download.fetch_cifar100(events=events, folder=tmp_path / "cache", opener=server(data), md5=md5)
    assert path.read_bytes() == data

    def unreachable(url: str) -> Any:
        raise AssertionError("it is in the cache")

    assert download.fetch_cifar100(events=events, folder=tmp_path / "cache", opener=unreachable, md5=md5) == path
    path.write_bytes(b"damaged")
    assert download.fetch_cifar100(events=events, folder=tmp_path / "cache", opener=server(data), md5=md5).read_bytes() == data


def test_another_file_is_refused_and_removed(tmp_path: Path, events: Any) -> None:
    with pytest.raises(EnvironmentLackingError, match="not the published archive"):
        download.fetch_cifar100(events=events, folder=tmp_path, opener=server(b"<html>"))
    assert list(tmp_path.iterdir()) == []


class Breaking(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise ConnectionResetError("reset by peer")
        return data


def test_a_connection_that_breaks_leaves_nothing(tmp_path: Path, events: Any) -> None:
    with pytest.raises(EnvironmentLackingError, match="reset by peer"):
        download.fetch_cifar100(events=events, folder=tmp_path, opener=lambda url: Breaking(b"half"))
    assert list(tmp_path.iterdir()) == []


def test_an_endless_answer_is_given_up(tmp_path: Path, events: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1 << 20)
    with pytest.raises(EnvironmentLackingError, match="not the published archive"):
        download.fetch_cifar100(events=events, folder=tmp_path, opener=lambda url: Zeros(b""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_no_network_is_quick(tmp_path: Path, events: Any) -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentLackingError) as caught:  # the tests block sockets
        download.fetch_cifar100(events=events, folder=tmp_path)
    assert time.monotonic() - started < 5
    assert "--path" in str(caught.value)


def test_a_name_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        def open(self, url: str, timeout: float) -> None:
            time.sleep(1.0)

    monkeypatch.setattr(download, "OPEN_SECONDS", 0.1)
    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: Hanging())
    with pytest.raises(OSError, match="no answer"):
        download.open_url(download.URL)
