"""The record index beside each shard: what it says, when it is believed, and how it comes back."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.records import HEADER, RECORD, StaleIndexError, read_record_index, record_index_size
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.verify import verify_folder
from pairclip_fast.errors import DataError

Copy = Callable[..., Path]


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_says_what_the_tar_holds(data_copy: Copy, encoding: str) -> None:
    with ShardReader(data_copy(encoding), "train") as reader:
        spans = reader.spans[reader.manifest.extension]
        assert np.array_equal(reader.records.offsets, spans.offsets)
        assert np.array_equal(reader.records.sizes, spans.sizes)
        for sample_id in range(len(reader)):
            assert int(reader.records.checksums[sample_id]) == zlib.crc32(reader.member(sample_id, reader.manifest.extension))
            assert int(reader.caption_ids[sample_id]) == json.loads(bytes(reader.member(sample_id, "json")))["caption_id"]


def test_its_layout_is_the_documented_one(data_copy: Copy) -> None:
    folder = data_copy()
    entry = read_manifest(folder).splits["train"].shards[1]
    data = (folder / "train" / entry.records_name).read_bytes()
    assert len(data) == record_index_size(entry.count) == 64 + 20 * entry.count
    assert data[:16] == b"PCFREC\r\n\1\0\0\0" + entry.count.to_bytes(4, "little")
    assert data[16:24] == entry.bytes.to_bytes(8, "little")
    assert data[24:56].hex() == entry.sha256
    assert data[56:64] == zlib.crc32(data[64:]).to_bytes(4, "little") + bytes(4)
    tar = (folder / "train" / entry.name).read_bytes()
    offset, size, checksum = int.from_bytes(data[64:72], "little"), int.from_bytes(data[72:76], "little"), data[76:80]
    assert zlib.crc32(tar[offset : offset + size]).to_bytes(4, "little") == checksum


def test_every_flipped_or_lost_byte_is_noticed(data_copy: Copy) -> None:
    folder = data_copy()
    manifest = read_manifest(folder)
    entry = manifest.splits["train"].shards[0]
    path = folder / "train" / entry.records_name
    whole = path.read_bytes()
    read_record_index(path, entry, num_captions=manifest.num_captions)
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(StaleIndexError):
            read_record_index(path, entry, num_captions=manifest.num_captions)
    for size in (0, 63, 64, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StaleIndexError):
            read_record_index(path, entry, num_captions=manifest.num_captions)


@pytest.mark.parametrize("field", ["offset", "size", "caption_id"])
def test_a_forged_index_cannot_point_outside(data_copy: Copy, field: str) -> None:
    """With a checksum that fits: whatever it says, no byte outside the tar is ever addressed."""
    folder = data_copy()
    manifest = read_manifest(folder)
    entry = manifest.splits["train"].shards[0]
    path = folder / "train" / entry.records_name
    records = np.frombuffer(path.read_bytes()[HEADER.size :], dtype=RECORD)
    for row in (0, 4, entry.count - 1):
        for value in (1, 513, entry.bytes, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
            forged = records.copy()
            if value >= 2 ** (8 * RECORD[field].itemsize) or (field == "size" and value == 1):
                continue
            forged[field][row] = value if field != "caption_id" else max(value, manifest.num_captions) % 2**32
            table = forged.tobytes()
            path.write_bytes(
                HEADER.pack(b"PCFREC\r\n", 1, entry.count, entry.bytes, bytes.fromhex(entry.sha256), zlib.crc32(table), 0) + table
            )
            if field == "size" and value == 513:
                continue  # shorter than the record, and inside: harmless, the checksum of the record will not fit
            with pytest.raises(StaleIndexError):
                read_record_index(path, entry, num_captions=manifest.num_captions)


@pytest.mark.parametrize("damage", ["missing", "of another shard", "of another version", "empty"])
def test_a_stale_index_is_made_anew_in_memory_and_told_once(data_copy: Copy, events: Any, damage: str) -> None:
    folder = data_copy()
    with ShardReader(folder, "train") as reader:
        wanted = reader.records
    for number in (1, 2):
        path = folder / "train" / f"{number:06d}.records"
        if damage == "missing":
            path.unlink()
        else:
            other = (folder / "train" / "000000.records").read_bytes()
            data = path.read_bytes()
            path.write_bytes({"of another shard": other, "of another version": data[:8] + b"\2" + data[9:], "empty": b""}[damage])
    with ShardReader(folder, "train", events=events) as reader:
        for name in ("offsets", "sizes", "checksums", "caption_ids"):
            assert np.array_equal(getattr(reader.records, name), getattr(wanted, name))
    (event,) = events.fallbacks
    assert event["what"] == "record index of train"
    assert event["reason"].startswith("000001.records: ")
    assert event["reason"].endswith(", and 1 more")


def test_an_index_left_over_from_other_pairs_is_not_believed(shard: Callable[..., Any], tmp_path: Path, events: Any) -> None:
    """Sharded again with another seed: as many records of the same sizes at the same places, but of other pixels and captions."""
    for seed in (1, 2):
        shard(out=tmp_path / str(seed), seed=seed)
    for path in (tmp_path / "1" / "train").glob("*.records"):
        shutil.copy(path, tmp_path / "2" / "train" / path.name)
    with ShardReader(tmp_path / "1", "train") as other, ShardReader(tmp_path / "2", "train", events=events) as reader:
        assert np.array_equal(other.records.offsets, reader.records.offsets)
        assert not np.array_equal(other.records.checksums, reader.records.checksums)
        reader.check(np.arange(len(reader)))
        for sample_id in range(len(reader)):
            assert int(reader.caption_ids[sample_id]) == json.loads(bytes(reader.member(sample_id, "json")))["caption_id"]
    (event,) = events.fallbacks
    assert event["what"] == "record index of train"


def test_it_is_not_made_from_a_changed_tar(data_copy: Copy) -> None:
    """Else the checksums of damaged records would count as right."""
    folder = data_copy()
    (folder / "train" / "000001.records").unlink()
    path = folder / "train" / "000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="neither the shard nor its index"):
        ShardReader(folder, "train")


def test_verify_compares_it_and_misses_it(data_copy: Copy, events: Any) -> None:
    folder = data_copy()
    lost = folder / "train" / "000000.records"
    content = lost.read_bytes()
    lost.unlink()
    assert [str(finding) for finding in verify_folder(folder, events=events)] == ["train/000000.records: missing"]
    lost.mkdir()
    assert [str(finding) for finding in verify_folder(folder, events=events)] == ["train/000000.records: cannot be read: Is a directory"]
    lost.rmdir()
    lost.write_bytes(content)
    path = folder / "train" / "000001.records"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    (finding,) = verify_folder(folder, events=events)
    assert (finding.where, finding.problem) == ("train/000001.records", "the record index is not that of its shard")


def test_sharding_again_gives_the_same_bytes(shard: Callable[..., Any], tmp_path: Path) -> None:
    first = shard(out=tmp_path / "first")
    second = shard(out=tmp_path / "second")
    names = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.records"))
    assert len(names) >= 2
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in names)
    files = [path for path in (tmp_path / "first").rglob("*.*") if path.name != "manifest.json"]
    assert first["bytes"] == second["bytes"] == sum(path.stat().st_size for path in files)
