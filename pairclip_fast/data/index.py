"""DALI's text index beside each shard: checked field by field, or made anew from a tar that is itself intact."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pairclip_fast.data.manifest import REBUILD, ShardEntry
from pairclip_fast.data.tar import BLOCK_BYTES, END_OF_ARCHIVE, INDEX_VERSION, index_text, read_members
from pairclip_fast.errors import DataError
from pairclip_fast.storage import sha256_file

Ints = npt.NDArray[np.int64]


def check_shard_size(path: Path, entry: ShardEntry) -> None:
    """Raise unless the shard is there and has the manifest's size.

    Raises:
        DataError: naming the shard, what is expected and what is there.
    """
    expected = f"{entry.bytes:,} bytes, {entry.count:,} samples"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError("a shard is missing", where=path, expected=expected, got=error.strerror, fix=REBUILD) from error
    if size != entry.bytes:
        raise DataError("a shard has the wrong size", where=path, expected=expected, got=f"{size:,} bytes", fix=REBUILD)


def rebuild_index(path: Path, entry: ShardEntry) -> bytes:
    """The index of a shard whose own digest is right.

    Raises:
        DataError: the tar is not the manifest's either.
    """
    digest = sha256_file(path)
    if digest != entry.sha256:
        what = "neither the shard nor its index is what the manifest says"
        raise DataError(what, where=path, expected=f"SHA-256 {entry.sha256}", got=digest, fix=REBUILD)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as buffer:
        members = list(read_members(buffer, where=path, max_members=3 * entry.count))
    return index_text([members[start : start + 3] for start in range(0, len(members), 3)])


def parse_index(lines: bytes, entry: ShardEntry, first_id: int, extensions: tuple[str, ...], *, where: object) -> Ints:
    """Offsets and sizes from DALI's text index, strictly: our keys, our member order, all inside the tar, none overlapping.

    Args:
        lines: The index file.
        entry: The manifest's word on the shard.
        first_id: Sample id of its first sample.
        extensions: The members of a sample, in order.
        where: What to call it in errors.

    Returns:
        int64 [count, 2 * len(extensions)]: offset and size of each member.

    Raises:
        DataError: it is not the index of such a shard.
    """
    width = len(extensions)
    tokens = lines.split()
    try:
        if tokens[:2] != [INDEX_VERSION.encode(), str(entry.count).encode()] or len(tokens) != 2 + 4 * width * entry.count:
            raise ValueError(f"{len(tokens)} fields for {entry.count} samples")
        table = np.empty((entry.count, 2 * width), dtype=np.int64)
        keys = [b"%09d." % sample_id for sample_id in range(first_id, first_id + entry.count)]
        for k, extension in enumerate(extension.encode() for extension in extensions):
            column = tokens[2 + 4 * k :: 4 * width]
            names = tokens[5 + 4 * k :: 4 * width]
            if column != [extension] * entry.count or names != [key + extension for key in keys]:
                raise ValueError(f"unexpected names of .{extension.decode()} members")
            table[:, 2 * k] = np.array(tokens[3 + 4 * k :: 4 * width], dtype="S20").astype(np.int64)
            table[:, 2 * k + 1] = np.array(tokens[4 + 4 * k :: 4 * width], dtype="S20").astype(np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError("the index does not fit its shard", where=where, got=error, fix=REBUILD) from error
    _check_layout(table.reshape(-1, 2), entry, where=where)
    return table


def _check_layout(spans: Ints, entry: ShardEntry, *, where: object) -> None:
    """Members lie back to back, each after one header, up to the end of the archive."""
    offsets, sizes = spans[:, 0], spans[:, 1]
    good = bool((sizes >= 0).all() and (sizes <= entry.bytes).all())
    if good:
        ends = offsets + -(-sizes // BLOCK_BYTES) * BLOCK_BYTES
        starts = np.concatenate([[0], ends[:-1]]) + BLOCK_BYTES
        good = bool((offsets == starts).all() and ends[-1] + len(END_OF_ARCHIVE) == entry.bytes)
    if not good:
        raise DataError("the index points outside its shard, or into the middle of members", where=where, fix=REBUILD)
