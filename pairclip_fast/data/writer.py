"""Writes one split as tars with two indices each: deterministic bytes, each file hashed as it is written and fsynced.

Nothing here knows that a sample is a pair of photos: a `SampleSource` hands over payload bytes, a JSON object and a
caption per sample, and the writer numbers them. Compressed payloads depend on the installed Pillow; raw ones on nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairclip_fast.data.keyed import random_bits
from pairclip_fast.data.manifest import EXTENSIONS, ShardEntry
from pairclip_fast.data.records import Record, record_index_bytes, record_index_size
from pairclip_fast.data.tar import BLOCK_BYTES, END_OF_ARCHIVE, Member, index_text, padded, ustar_member
from pairclip_fast.storage import FileSystem, storage_errors

JPEG_QUALITY = 95
WRITE_SAMPLES = 256
"""Samples per write: 2 MB raw."""
TEXT_BYTES = 4 * BLOCK_BYTES
"""Room for the JSON and caption members of a sample, headers included, unless they are unusually long."""


@runtime_checkable
class SampleSource(Protocol):
    """The samples of one split, in order."""

    def __len__(self) -> int: ...

    def tiles(self, index: int) -> npt.NDArray[np.uint8]:
        """uint8 [tiles, height, width, 3]."""
        ...

    def facts(self, index: int) -> dict[str, Any]:
        """The JSON member; has the key `caption_id`."""
        ...

    def caption(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFormat:
    """How samples become files."""

    encoding: str
    shard_size: int


def encode_tiles(tiles: npt.NDArray[np.uint8], encoding: str) -> bytes:
    """The payload of one sample.

    Args:
        tiles: uint8 [tiles, height, width, 3].
        encoding: `raw`: the tiles as they are; `png`, `jpeg`: the tiles side by side as one picture.
    """
    if encoding == "raw":
        return tiles.tobytes()
    picture = Image.fromarray(np.concatenate(list(tiles), axis=1))
    file = io.BytesIO()
    if encoding == "png":
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def sample_members(samples: SampleSource, index: int, encoding: str) -> tuple[list[tuple[str, bytes]], int]:
    """Names and contents of the files of one sample, the payload first, and its caption id."""
    key, facts = f"{index:09d}", samples.facts(index)
    payload = encode_tiles(samples.tiles(index), encoding)
    words = json.dumps(facts, separators=(",", ":"), ensure_ascii=True).encode()
    members = [(f"{key}.{EXTENSIONS[encoding]}", payload), (f"{key}.json", words), (f"{key}.txt", samples.caption(index).encode())]
    return members, int(facts["caption_id"])


def bytes_needed(samples: SampleSource, shard_format: ShardFormat) -> int:
    """About how much disk a split takes; for compressed payloads from a few samples."""
    some = random_bits(8, seed=0, stream="space") % np.uint64(len(samples))
    payload = max(len(encode_tiles(samples.tiles(int(index)), shard_format.encoding)) for index in some)
    return len(samples) * (padded(payload) + BLOCK_BYTES + TEXT_BYTES + BLOCK_BYTES // 2) + record_index_size(len(samples))


def write_split(
    folder: Path, samples: SampleSource, shard_format: ShardFormat, *, fs: FileSystem, advance: Callable[[int], None]
) -> tuple[ShardEntry, ...]:
    """Write all shards of a split into `folder`, which is made.

    Args:
        folder: Where the tars go; the caller gives it its final name when everything is whole.
        samples: What to write.
        shard_format: Encoding and samples per shard.
        fs: Where durability comes from.
        advance: Told how many samples were just written.

    Returns:
        The manifest entries of the shards.

    Raises:
        StorageError: the disk is full or failed.
    """
    with storage_errors(folder):
        fs.mkdir(folder)
        entries = []
        for number, start in enumerate(range(0, len(samples), shard_format.shard_size)):
            ids = range(start, min(start + shard_format.shard_size, len(samples)))
            entries.append(_write_shard(folder / f"{number:06d}.tar", samples, ids, shard_format.encoding, fs=fs, advance=advance))
        fs.fsync_folder(folder)
    return tuple(entries)


def _write_shard(
    path: Path, samples: SampleSource, ids: range, encoding: str, *, fs: FileSystem, advance: Callable[[int], None]
) -> ShardEntry:
    digest, offset = hashlib.sha256(), 0
    index: list[list[Member]] = []
    records: list[Record] = []
    with fs.open_for_writing(path) as file:
        for start in range(0, len(ids), WRITE_SAMPLES):
            pieces = []
            for sample_id in ids[start : start + WRITE_SAMPLES]:
                contents, caption_id = sample_members(samples, sample_id, encoding)
                payload = contents[0][1]
                records.append((offset + BLOCK_BYTES, len(payload), zlib.crc32(payload), caption_id))
                members = []
                for name, data in contents:
                    members.append(Member(name, offset + BLOCK_BYTES, len(data)))
                    pieces.append(ustar_member(name, data))
                    offset += len(pieces[-1])
                index.append(members)
            if start + WRITE_SAMPLES >= len(ids):
                pieces.append(END_OF_ARCHIVE)
                offset += len(END_OF_ARCHIVE)
            block = b"".join(pieces)
            digest.update(block)
            fs.write(file, block)
            advance(len(ids[start : start + WRITE_SAMPLES]))
        fs.fsync(file)
    lines = index_text(index)
    entry = ShardEntry(
        name=path.name,
        count=len(ids),
        bytes=offset,
        sha256=digest.hexdigest(),
        index_bytes=len(lines),
        index_sha256=hashlib.sha256(lines).hexdigest(),
    )
    _write_file(path.with_name(entry.index_name), lines, fs=fs)
    _write_file(path.with_name(entry.records_name), record_index_bytes(records, tar_bytes=offset, tar_sha256=entry.sha256), fs=fs)
    return entry


def _write_file(path: Path, data: bytes, *, fs: FileSystem) -> None:
    with fs.open_for_writing(path) as file:
        fs.write(file, data)
        fs.fsync(file)
