"""The files: our tar and index against GNU tar, `tarfile`, `wds2idx`, webdataset, DALI and open_clip's keys."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.tar import END_OF_ARCHIVE, read_members, ustar_header, ustar_member
from pairclip_fast.errors import DataError

ENCODINGS = ("raw", "png", "jpeg")
OPEN_CLIP_IMAGE = "jpg;png;jpeg;webp"
"""As in open_clip's `wds.rename(image=..., text="txt")`."""


@given(st.integers(0, 999_999_999), st.sampled_from(["rgb", "png", "jpg", "json", "txt"]), st.binary(max_size=2_000))
def test_members_come_back_from_tarfile_and_from_our_reader(number: int, extension: str, data: bytes) -> None:
    name = f"{number:09d}.{extension}"
    archive = ustar_member(name, data) + END_OF_ARCHIVE
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        (member,) = opened.getmembers()
        file = opened.extractfile(member)
        assert file is not None
        assert (member.name, member.mode, member.mtime, member.uid, file.read()) == (name, 0o644, 0, 0, data)
    (ours,) = read_members(memoryview(archive), where="x", max_members=1)
    assert (ours.name, archive[ours.offset : ours.offset + ours.size]) == (name, data)


@pytest.mark.parametrize("name", ["x" * 101, "umlaut-\u00e4"])
def test_names_that_do_not_fit_are_our_bug(name: str) -> None:
    with pytest.raises((ValueError, UnicodeEncodeError)):
        ustar_header(name, 1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_index_is_what_wds2idx_writes(data_copy: Callable[[str], Path], encoding: str, tmp_path: Path) -> None:
    specification = importlib.util.find_spec("wds2idx")
    if specification is None:
        pytest.skip("nvidia-dali is not installed")
    import wds2idx

    reader = ShardReader(data_copy(encoding), "train")
    for shard, index in zip(reader.shard_paths, reader.index_paths, strict=True):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == index.read_bytes()


def read_with_webdataset(paths: list[Path], *stages: Callable[[Any], Any]) -> list[Any]:
    """All samples; webdataset 1.0 leaves its last file to the garbage collector, which is not ours to report."""
    webdataset = pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pipeline = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
        for stage in stages:
            pipeline = stage(pipeline)
        samples = list(pipeline)
        del pipeline
        gc.collect()
    return samples


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_webdataset_reads_the_shards(data_copy: Callable[[str], Path], encoding: str) -> None:
    with ShardReader(data_copy(encoding), "train") as reader:
        samples = read_with_webdataset(reader.shard_paths)
        assert len(samples) == len(reader) == 33
        for sample_id, sample in enumerate(samples):
            assert sample["__key__"] == f"{sample_id:09d}"
            assert sample[reader.manifest.extension] == bytes(reader.payload(sample_id))
            facts = json.loads(sample["json"])
            assert facts["caption_id"] == reader.caption_ids[sample_id] == facts["left"] * 4 + facts["right"]
            left, right = (reader.manifest.class_names[facts[side]] for side in ("left", "right"))
            assert sample["txt"].decode() == f"the photo on the left is {left} and the photo on the right is {right}"


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_open_clip_keys_find_picture_and_text(data_copy: Callable[[str], Path], encoding: str) -> None:
    with ShardReader(data_copy(encoding), "val") as reader:
        stages = (
            lambda pipeline: pipeline.decode("pilrgb"),
            lambda pipeline: pipeline.rename(image=OPEN_CLIP_IMAGE, text="txt"),
            lambda pipeline: pipeline.to_tuple("image", "text"),
        )
        samples = read_with_webdataset(reader.shard_paths, *stages)
        assert len(samples) == len(reader)
        for sample_id, (image, text) in enumerate(samples):
            assert image.size == (64, 32)
            assert text.startswith("the photo on the left is ")
            tiles = reader.tiles(sample_id)
            assert (np.asarray(image) == np.concatenate(list(tiles), axis=1)).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dali_reads_shards_and_index(data_copy: Callable[[str], Path], encoding: str) -> None:
    dali = pytest.importorskip("nvidia.dali")
    with ShardReader(data_copy(encoding), "train") as reader:
        pipeline = dali.Pipeline(batch_size=11, num_threads=1, device_id=None)
        with pipeline:
            outputs = dali.fn.readers.webdataset(
                paths=[str(path) for path in reader.shard_paths],
                index_paths=[str(path) for path in reader.index_paths],
                ext=[reader.manifest.extension, "json", "txt"],
                missing_component_behavior="error",
            )
            payload = outputs[0] if encoding == "raw" else dali.fn.decoders.image(outputs[0])
            pipeline.set_outputs(payload, *outputs[1:])
        pipeline.build()
        for batch in range(3):
            pictures, facts, _ = pipeline.run()
            for row in range(11):
                sample_id = batch * 11 + row
                got, tiles = np.asarray(pictures[row]), reader.tiles(sample_id)
                wanted = tiles.reshape(-1) if encoding == "raw" else np.concatenate(list(tiles), axis=1)
                assert np.abs(got.astype(int) - wanted.astype(int)).max() <= (3 if encoding == "jpeg" else 0)
                assert json.loads(bytes(np.asarray(facts[row])))["caption_id"] == reader.caption_ids[sample_id]


def test_lossless_encodings_hold_the_source_pixels(data_copy: Callable[[str], Path], noise: Callable[[int], np.ndarray]) -> None:
    for encoding in ("raw", "png"):
        with ShardReader(data_copy(encoding), "train") as reader:
            for sample_id in range(len(reader)):
                facts = json.loads(bytes(reader.member(sample_id, "json")))
                for side, tile in zip(("left", "right"), reader.tiles(sample_id), strict=True):
                    number = int(facts[f"{side}_source"].split("/")[-1].removesuffix(".png"))
                    assert (tile == noise(facts[side] * 1000 + number)).all()


def test_jpeg_is_high_quality_without_chroma_subsampling(data_copy: Callable[[str], Path]) -> None:
    with ShardReader(data_copy("jpeg"), "train") as reader:
        picture = Image.open(io.BytesIO(reader.payload(0)))
        assert picture.layer[0][1:3] == picture.layer[1][1:3] == (1, 1)
        assert max(picture.quantization[0]) <= 12


def test_reader_gathers_and_refuses_ids_outside(data_copy: Callable[[str], Path]) -> None:
    reader = ShardReader(data_copy("raw"), "train")
    ids = np.array([32, 0, 10, 9])
    assert (reader.tiles_of(ids) == np.stack([reader.tiles(int(i)) for i in ids])).all()
    assert reader.tiles_of(ids).shape == (4, 2, 32, 32, 3)
    for outside in (-1, 33):
        with pytest.raises(IndexError):
            reader.payload(outside)
    view = reader.payload(3)
    reader.close()
    reader.close()
    assert len(view) == 6144


# --- hostile tars: our reader takes only what we would have written -------------------------------------------------


def tar_of(info: tarfile.TarInfo, data: bytes = b"", kind: int = tarfile.USTAR_FORMAT) -> bytes:
    info.size = info.size or len(data)
    info.mode, info.uid, info.gid = 0o644, 0, 0
    return info.tobuf(kind) + data + bytes(-len(data) % 512) + END_OF_ARCHIVE


def hostile_tars() -> dict[str, bytes]:
    def info(name: str = "000000000.rgb", kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.type, made.size, made.linkname = kind, size, link
        return made

    good = ustar_member("000000000.rgb", b"abc")
    return {
        "parent folder": tar_of(info("../000000000.rgb"), b"x"),
        "absolute": tar_of(info("/etc/passwd"), b"x"),
        "symlink": tar_of(info(kind=tarfile.SYMTYPE, link="/etc/passwd")),
        "hard link": tar_of(info(kind=tarfile.LNKTYPE, link="x")),
        "device": tar_of(info(kind=tarfile.CHRTYPE)),
        "fifo": tar_of(info(kind=tarfile.FIFOTYPE)),
        "folder": tar_of(info("000000000", kind=tarfile.DIRTYPE)),
        "8 GB size": tar_of(info(size=8**11 - 1)),
        "binary size": tar_of(info(size=8**12), kind=tarfile.GNU_FORMAT),
        "pax header": tar_of(info("x" * 200), b"x", kind=tarfile.PAX_FORMAT),
        "pax bomb": tar_of(info("000000000.txt", kind=tarfile.XHDTYPE, size=8**11 - 1)),
        "junk name": tar_of(info("\u202e.rgb"), b"x", kind=tarfile.GNU_FORMAT),
        "NUL in name": ustar_header("000000000.rgb", 0).replace(b"000.rgb\0", b"000\0rgb\0") + END_OF_ARCHIVE,
        "too many": good * 10 + END_OF_ARCHIVE,
        "no end": good,
        "half an end": good + bytes(512),
        "data after the end": good + END_OF_ARCHIVE + b"x",
        "dirty padding": good[:-1] + b"x" + END_OF_ARCHIVE,
        "cut": good[:600],
        "empty file": b"",
        "wrong checksum": good.replace(b"0000644", b"0000645") + END_OF_ARCHIVE,
        "other owner": good.replace(b"0000000\x000000000\0", b"0000001\x000000000\0") + END_OF_ARCHIVE,
    }


@pytest.mark.parametrize("name", hostile_tars())
def test_hostile_tars_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        list(read_members(memoryview(hostile_tars()[name]), where="shard", max_members=9))


@given(st.data())
def test_any_flipped_byte_of_a_tar_is_refused_or_in_the_data(data: st.DataObject) -> None:
    archive = bytearray(ustar_member("000000000.rgb", b"abc") + ustar_member("000000000.txt", b"def") + END_OF_ARCHIVE)
    position = data.draw(st.integers(0, len(archive) - 1))
    archive[position] ^= data.draw(st.integers(1, 255))
    try:
        names = [member.name for member in read_members(memoryview(bytes(archive)), where="x", max_members=2)]
    except DataError:
        return
    payload = [*range(512, 515), *range(1536, 1539)]
    assert position in payload, names
