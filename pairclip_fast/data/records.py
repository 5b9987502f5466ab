"""The record index: a small binary file beside each shard that says where every payload lies and what its CRC-32 must be.

The text index beside it is for other programs; this one opens in a millisecond and holds what a tar cannot: a checksum per
record (a tar's own cover headers only), so that a flipped bit in raw pixels is found when the record is read, and the
caption id, so that no JSON has to be parsed to train. It can be derived from the tar, hence it is no part of the data's
identity: `verify` compares it, and the reader makes it anew in memory where it is missing or stale.

Little-endian. Header of 64 bytes: magic (8), version u32, records u32, bytes of the tar u64, SHA-256 of the tar (32), CRC-32 of
the records u32, zero u32. Then 20 bytes per record: offset u64, size u32, CRC-32 u32, caption id u32.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pairclip_fast.data.manifest import REBUILD, ShardEntry
from pairclip_fast.data.tar import BLOCK_BYTES, END_OF_ARCHIVE, Member, read_members
from pairclip_fast.errors import DataError
from pairclip_fast.storage import sha256_file

Ints = npt.NDArray[np.int64]
MAGIC = b"PCFREC\r\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32sII")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("caption_id", "<u4")])
Record = tuple[int, int, int, int]
"""Offset, size, CRC-32 and caption id."""


class CaptionFacts(msgspec.Struct):
    """What every sample's JSON member must have, whatever the kind of sample."""

    caption_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class RecordIndex:
    """The payloads of consecutive samples; all arrays have one entry per sample."""

    offsets: Ints
    """In the sample's own tar."""
    sizes: Ints
    checksums: npt.NDArray[np.uint32]
    caption_ids: Ints

    @classmethod
    def of(cls, records: npt.NDArray[Any]) -> RecordIndex:
        offsets, sizes, caption_ids = (records[name].astype(np.int64) for name in ("offset", "size", "caption_id"))
        return cls(offsets, sizes, records["crc32"].astype(np.uint32), caption_ids)


class StaleIndexError(Exception):
    """A record index is not that of its shard; says why."""


def record_index_bytes(records: Sequence[Record], *, tar_bytes: int, tar_sha256: str) -> bytes:
    """The index file of a shard."""
    table = np.array(list(records), dtype=RECORD).tobytes()
    return HEADER.pack(MAGIC, VERSION, len(records), tar_bytes, bytes.fromhex(tar_sha256), zlib.crc32(table), 0) + table


def record_index_size(count: int) -> int:
    """Bytes of the index file of a shard with so many samples."""
    return HEADER.size + count * RECORD.itemsize


def read_record_index(path: Path, entry: ShardEntry, *, num_captions: int) -> npt.NDArray[Any]:
    """The records of a shard, an array of `RECORD`.

    Raises:
        StaleIndexError: the file is missing, damaged, or of another tar.
    """
    try:
        if path.stat().st_size != record_index_size(entry.count):
            raise StaleIndexError("it has the wrong size")
        data = path.read_bytes()
    except OSError as error:
        raise StaleIndexError(error.strerror or str(error)) from error
    table = data[HEADER.size :]
    expected = HEADER.pack(MAGIC, VERSION, entry.count, entry.bytes, bytes.fromhex(entry.sha256), zlib.crc32(table), 0)
    if data[: HEADER.size] != expected:
        raise StaleIndexError("it is damaged, or that of another shard")
    records = np.frombuffer(table, dtype=RECORD)
    if not _fits(records, entry, num_captions=num_captions):
        raise StaleIndexError("it points outside its shard")
    return records


def _fits(records: npt.NDArray[Any], entry: ShardEntry, *, num_captions: int) -> bool:
    """Payloads start after a header, lie inside the tar and do not overlap; caption ids are in range."""
    index = RecordIndex.of(records)
    ends = index.offsets + -(-index.sizes // BLOCK_BYTES) * BLOCK_BYTES
    after = np.concatenate([[0], ends[:-1]]) + BLOCK_BYTES
    inside = (index.offsets >= after) & (index.offsets % BLOCK_BYTES == 0) & (ends + len(END_OF_ARCHIVE) <= entry.bytes)
    return bool((inside & (index.caption_ids < num_captions)).all())


def derive_records(buffer: memoryview, members: Sequence[Member], *, num_captions: int, where: object) -> list[Record]:
    """The records of a shard from its members: payload, JSON and caption of each sample.

    Nothing of `buffer` is held, not even by an exception, so that it can be unmapped.

    Raises:
        DataError: a JSON member is damaged, or a caption id is out of range.
    """
    decoder, records = msgspec.json.Decoder(CaptionFacts), []
    for payload, facts in zip(members[0::3], members[1::3], strict=False):
        data = bytes(buffer[payload.offset : payload.offset + payload.size])
        key = f"{where}: {payload.name.split('.', 1)[0]}"
        try:
            caption_id = decoder.decode(bytes(buffer[facts.offset : facts.offset + facts.size])).caption_id
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise DataError("a sample's JSON is damaged", where=key, got=error, fix=REBUILD) from error
        if not 0 <= caption_id < num_captions:
            raise DataError("a caption id is out of range", where=key, expected=f"0..{num_captions - 1}", got=caption_id)
        records.append((payload.offset, payload.size, zlib.crc32(data), caption_id))
    return records


def rebuild_records(path: Path, entry: ShardEntry, *, num_captions: int) -> npt.NDArray[Any]:
    """The records of a shard whose own digest is right; 50,000 take a second or two.

    Raises:
        DataError: the tar is not the manifest's, or its samples are damaged.
    """
    digest = sha256_file(path)
    if digest != entry.sha256:
        what = "neither the shard nor its index is what the manifest says"
        raise DataError(what, where=path, expected=f"SHA-256 {entry.sha256}", got=digest, fix=REBUILD)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as buffer:
        members = list(read_members(buffer, where=path, max_members=3 * entry.count))
        if len(members) != 3 * entry.count:
            expected = f"{3 * entry.count:,} members"
            raise DataError("a shard does not match the manifest", where=path, expected=expected, got=f"{len(members):,}", fix=REBUILD)
        records = derive_records(buffer, members, num_captions=num_captions, where=path)
    return np.array(records, dtype=RECORD)
