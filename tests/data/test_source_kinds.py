"""Parquet files, generated shapes, and the choice between all kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairclip_fast.cli import VerifyOptions
from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.sources import download, locate, open_source
from pairclip_fast.data.sources.shapes import class_names, read_shapes
from pairclip_fast.errors import ConfigError, DataError, EnvironmentLackingError
from pairclip_fast.text.options import EmbedOptions
from pairclip_fast.train.options import TrainOptions
from pairclip_fast.train.run_folder import choose

Png = Callable[..., bytes]
NAMES = ["apple", "aquarium_fish", "baby"]


@pytest.fixture
def write_parquet(png: Png, noise: Callable[[int], np.ndarray]) -> Callable[..., Path]:
    """Write a parquet file of noise pictures; keywords change one thing."""

    def write(
        path: Path,
        *,
        count: int = 12,
        first_seed: int = 0,
        image: str = "img",
        label: str = "fine_label",
        labels: list[Any] | None = None,
        pictures: list[Any] | None = None,
        names: Any = NAMES,
        plain: bool = False,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [png(noise(first_seed + k)) for k in range(count)] if pictures is None else pictures
        column = files if plain else [{"bytes": data, "path": None} for data in files]
        kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = [k % 3 for k in range(count)] if labels is None else labels
        metadata = {} if names is None else {"huggingface": json.dumps({"info": {"features": {label: {"names": names}}}})}
        table = pa.table({image: pa.array(column, kind), label: pa.array(values)}).replace_schema_metadata(metadata)
        pq.write_table(table, path, row_group_size=5)
        return path

    return write


@pytest.fixture
def opened(events: Any) -> Callable[..., Any]:
    def run(path: Path, test_path: Path | None = None, *, on_bad: str = "raise") -> Any:
        return open_source("parquet", path=path, test_path=test_path, seed=0, on_bad=on_bad, events=events)

    return run


def test_a_parquet_file(write_parquet: Callable[..., Path], opened: Callable[..., Any], tmp_path: Path, noise: Any) -> None:
    for number, options in enumerate(({}, {"image": "image", "label": "label"}, {"plain": True}, {"names": dict(enumerate(NAMES))})):
        sources = opened(write_parquet(tmp_path / f"file{number}.parquet", **options))
        assert (sources.train.images == np.stack([noise(k) for k in range(12)])).all()
        assert sources.train.labels.tolist() == [0, 1, 2] * 4
        assert sources.train.class_names == ("apple", "aquarium fish", "baby")
        assert sources.train.ids[11] == f"file{number}.parquet#11"
        assert sources.test is None


def test_a_hub_folder_has_its_test_part_found(write_parquet: Callable[..., Path], opened: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    write_parquet(folder / "train-00000-of-00002.parquet")
    write_parquet(folder / "train-00001-of-00002.parquet", first_seed=100)
    write_parquet(folder / "test-00000-of-00001.parquet", first_seed=200, count=3)
    sources = opened(folder)
    assert len(sources.train.labels) == 24
    assert len(set(sources.train.ids)) == 24
    assert len(sources.test.labels) == 3
    write_parquet(folder / "other.parquet")
    with pytest.raises(DataError, match="mixes train files with others"):
        opened(folder)


def test_parquet_files_one_folder_down_are_found(write_parquet: Callable[..., Path], tmp_path: Path, events: Any) -> None:
    (tmp_path / "hf" / ".cache").mkdir(parents=True)
    for name in (".cache/old", "cifar100/train-0", "cifar100/test-0"):
        write_parquet(tmp_path / "hf" / f"{name}.parquet")
    found = locate("auto", path=tmp_path / "hf", test_path=None, events=events)
    assert (found.kind, found.path) == ("parquet", tmp_path / "hf" / "cifar100")
    test = write_parquet(tmp_path / "other" / "part" / "test-0.parquet").parent
    assert locate("auto", path=found.path, test_path=test.parent, events=events).test_path == test
    with pytest.raises(ConfigError, match="would be the training images"):
        locate("auto", path=found.path, test_path=tmp_path / "hf", events=events)
    write_parquet(tmp_path / "hf" / "cifar10" / "train-0.parquet")
    with pytest.raises(DataError, match="several folders") as caught:
        locate("auto", path=tmp_path / "hf", test_path=None, events=events)
    assert caught.value.got == "cifar10, cifar100"


def test_a_test_path(write_parquet: Callable[..., Path], opened: Callable[..., Any], tmp_path: Path) -> None:
    train, test = write_parquet(tmp_path / "a.parquet"), write_parquet(tmp_path / "b.parquet", first_seed=50, count=2)
    assert len(opened(train, test).test.labels) == 2
    assert len(opened(train, write_parquet(tmp_path / "folder" / "c.parquet", count=4).parent).test.labels) == 4
    other = write_parquet(tmp_path / "other.parquet", names=["apple", "bee", "baby"])
    with pytest.raises(DataError, match="other classes") as caught:
        opened(train, other)
    assert (caught.value.expected, caught.value.got) == ("aquarium fish", "bee")
    with pytest.raises(DataError, match="another number"):
        opened(train, write_parquet(tmp_path / "more.parquet", names=[*NAMES, "bear"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "picture"}, "lacks a column"),
        ({"label": "coarse_label"}, "lacks a column"),
        ({"names": None}, "does not name its classes"),
        ({"names": 5}, "does not name its classes"),
        ({"names": [1, 2, 3]}, "does not name its classes"),
        ({"names": ["only"]}, "too few classes"),
        ({"labels": ["a"] * 12}, "does not hold class numbers"),
        ({"labels": [0, 1, None] * 4}, "label is missing"),
        ({"labels": [0, 1, 3] * 4}, "out of range"),
        ({"labels": [0, 1, -1] * 4}, "out of range"),
        ({"labels": [0, 1, 0] * 4}, "without images"),
        ({"pictures": [None] * 12}, "bad image"),
        ({"pictures": [b"x"] * 12}, "bad image"),
        ({"pictures": [], "labels": pa.array([], pa.int64())}, "empty"),
    ],
)
def test_bad_parquet_files(
    write_parquet: Callable[..., Path], opened: Callable[..., Any], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        opened(write_parquet(tmp_path / "file.parquet", **options))


def test_damaged_parquet_files(write_parquet: Callable[..., Path], opened: Callable[..., Any], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "file.parquet")
    whole = path.read_bytes()
    for data in (b"", b"x", whole[:-20], whole[: len(whole) // 2], whole[:1000] + bytes(2000) + whole[3000:]):
        path.write_bytes(data)
        with pytest.raises(DataError):
            opened(path)


def test_names_that_are_no_text_can_be_written_down(
    write_parquet: Callable[..., Path], shard: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder, name = tmp_path / b"\xffa".decode("utf-8", "surrogateescape"), b"\xfeb.parquet".decode("utf-8", "surrogateescape")
    folder.mkdir()
    for place in (folder, tmp_path):
        write_parquet(tmp_path / "x.parquet", first_seed=len(place.name)).rename(place / name)
    summary = shard(source="parquet", path=folder, test_path=tmp_path / name)
    manifest = read_manifest(Path(summary["out"]))
    assert manifest.description == "parquet \\xffa, test \\xfeb.parquet"


def test_real_parquet(cifar100_folder: Path) -> None:
    from pairclip_fast.data.sources.parquet import parquet_parts

    train, _ = parquet_parts(cifar100_folder / "train.parquet")
    names = json.loads(pq.ParquetFile(train[0]).schema_arrow.metadata[b"huggingface"])["info"]["features"]["fine_label"]["names"]
    assert len(names) == 100


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_there_are_100_classes_of_shapes() -> None:
    names = class_names()
    assert len(set(names)) == 100
    assert "red star" in names
    assert names[57] == "pink ring"


def test_shapes_are_balanced_deterministic_and_distinct(events: Any) -> None:
    def drawn(part: str, seed: int) -> Any:
        return read_shapes(part, num_images=110, seed=seed, size=32, events=events)

    train = drawn("train", 0)
    assert np.ptp(np.bincount(train.labels, minlength=100)) == 1
    assert (train.images == drawn("train", 0).images).all()
    pictures = {image.tobytes() for part in ("train", "test") for seed in (0, 1) for image in drawn(part, seed).images}
    assert len(pictures) == 4 * 110


def test_a_longer_set_starts_with_other_images_but_the_same_classes(events: Any) -> None:
    train = read_shapes("train", num_images=100, seed=0, size=32, events=events)
    assert np.bincount(train.labels).tolist() == [1] * 100


def test_shapes_show_their_colour(events: Any) -> None:
    """The middle half of a square or circle is mostly of its named colour: red ones are redder than blue ones."""
    train = read_shapes("train", num_images=400, seed=0, size=32, events=events)
    names = np.array(train.class_names)[train.labels]

    def mean(name: str) -> np.ndarray:
        return train.images[names == name][:, 12:20, 12:20].astype(float).mean(axis=(0, 1, 2))

    assert mean("red square")[0] > mean("blue square")[0] + 60
    assert mean("blue square")[2] > mean("red square")[2] + 60
    assert mean("white circle").min() > 150


def test_other_tile_sizes(events: Any) -> None:
    assert read_shapes("train", num_images=100, seed=0, size=48, events=events).images.shape == (100, 48, 48, 3)


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any data: empty home, cache and working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PAIRCLIP_CIFAR100", raising=False)
    return tmp_path


def archive_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.usefixtures("alone")
def test_auto_without_anything_draws_shapes_and_says_why(events: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(kind: str) -> Any:
        found = locate(kind, path=None, test_path=None, events=events)
        options: dict[str, Any] = {"path": found.path, "test_path": None, "fallback": found.fallback, "num_images": 100}
        return open_source(found.kind, seed=0, on_bad="raise", events=events, **options)

    def refuse(**_: Any) -> Path:
        raise EnvironmentLackingError("CIFAR-100 could not be downloaded: no route to host")

    monkeypatch.setattr(download, "fetch_cifar100", refuse)
    sources = opened("auto")
    assert sources.train.source == "shapes"
    assert "no route to host" in (sources.fallback_reason or "")
    assert [event["chosen"] for event in events.fallbacks] == ["generated shapes"]
    with pytest.raises(EnvironmentLackingError):
        opened("cifar100")


@pytest.mark.parametrize("place", ["work", "work/data", "home/.cache/pairclip-fast", "home/.cache"])
def test_auto_finds_an_archive_in_the_usual_places(alone: Path, events: Any, place: str) -> None:
    wanted = archive_folder(alone / place / "cifar-100-python")
    for kind in ("auto", "cifar100"):
        found = locate(kind, path=None, test_path=None, events=events)
        assert (found.kind, found.path and found.path.resolve()) == ("cifar100", wanted)
    assert "usual place" in events.messages()


@pytest.mark.usefixtures("alone")
def test_where_images_lie_in_the_usual_data_folder_all_commands_take_another(events: Any, noise: Callable[[int], np.ndarray]) -> None:
    def defaults() -> set[Path]:
        return {ShardOptions().out, EmbedOptions().data, VerifyOptions().data, choose(TrainOptions(out=Path("run"))).data}

    assert defaults() == {Path("data")}
    archive = Path("data", "cifar-100-binary")
    archive.mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        records = (bytes([0, k % 3]) + noise(30 * number + k).tobytes() for k in range(30))
        (archive / f"{part}.bin").write_bytes(b"".join(records))
    (archive / "fine_label_names.txt").write_text("\n".join(NAMES))
    assert run_shard(ShardOptions(), events)["out"] == "data-pairs"
    assert "CIFAR-100 itself lies in data" in events.messages()
    assert defaults() == {Path("data-pairs")}
    Path("data-pairs", "manifest.json").rename("data/manifest.json")
    assert defaults() == {Path("data")}


def test_auto_takes_the_folder_named_by_the_environment(
    alone: Path, events: Any, write_parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_parquet(alone / "real" / "train.parquet").parent
    archive_folder(alone / "work" / "cifar-100-python")
    monkeypatch.setenv("PAIRCLIP_CIFAR100", str(folder))
    found = locate("auto", path=None, test_path=None, events=events)
    assert (found.kind, found.path) == ("parquet", folder)
    monkeypatch.setenv("PAIRCLIP_CIFAR100", str(folder / "nowhere"))
    with pytest.raises(ConfigError, match="names no folder"):
        locate("auto", path=None, test_path=None, events=events)


def test_a_dry_run_downloads_nothing(alone: Path, shard: Callable[..., dict[str, Any]], tree: Callable[..., Any]) -> None:
    before = tree(alone)
    summary = shard(source="auto", path=None, dry_run=True)
    assert summary["action"] == "planned"
    assert "usual places" in summary["source"]
    assert tree(alone) == before


def test_given_paths_are_recognised(alone: Path, events: Any, photo_folder: Path, write_parquet: Callable[..., Path]) -> None:
    file = write_parquet(alone / "parquet" / "x.parquet")
    archive = archive_folder(alone / "around" / "cifar-100-python")
    (alone / "y.tar.gz").write_bytes(b"")
    cases = {photo_folder: "imagefolder", file: "parquet", file.parent: "parquet", archive: "cifar100", alone / "y.tar.gz": "cifar100"}
    for path, kind in cases.items():
        assert locate("auto", path=path, test_path=None, events=events).kind == kind
        assert locate(kind, path=path, test_path=None, events=events).path == path
    assert locate("auto", path=archive.parent, test_path=None, events=events).path == archive


@pytest.mark.parametrize(
    ("kind", "path", "test_path", "words"),
    [
        ("auto", "nowhere", None, "does not exist"),
        ("auto", "photos", "nowhere", "does not exist"),
        ("auto", "photos", "photos", "would be the training images"),
        ("parquet", "photos", None, "does not look like"),
        ("parquet", None, None, "needs --path"),
        ("imagefolder", None, None, "needs --path"),
        ("shapes", "photos", None, "have no --path"),
        ("auto", "cifar-100-python", "photos", "its own test part"),
        ("auto", "photos", "x.parquet", "another kind"),
    ],
)
def test_paths_that_do_not_fit(alone: Path, events: Any, photo_folder: Path, kind: str, path: str, test_path: str, words: str) -> None:
    archive_folder(alone / "cifar-100-python")
    (alone / "x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=words):
        locate(kind, path=path and alone / path, test_path=test_path and alone / test_path, events=events)


def test_nothing_known_at_the_path(alone: Path, events: Any) -> None:
    (alone / "x.txt").write_bytes(b"")
    for path in (alone / "work", alone / "x.txt"):
        with pytest.raises(DataError, match="no images of a known kind"):
            locate("auto", path=path, test_path=None, events=events)


def test_no_room_that_reads_sources_loads_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from pairclip_fast.data import commands, verify\n"
        "from pairclip_fast.data.sources import cifar100, download, imagefolder, parquet, shapes\n"
        "assert not {'torch', 'nvidia.dali', 'webdataset'} & set(sys.modules)\n"
        "from pairclip_fast.data import options\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
    subprocess.run(
        [sys.executable, "-c", "import sys; import pairclip_fast.data.options; assert 'numpy' not in sys.modules"], check=True, timeout=50
    )
