"""The few hundred bytes of the tar format that we need, written and read by ourselves.

`tarfile` writes what it likes (PAX headers, times, owners) and reads what anyone likes (links, devices, 8 GB pax
headers). Our shards are plain USTAR with every field fixed, so a header is a pure function of (name, size), and the
strictest possible reader is one that writes the header again and compares. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from pairclip_fast.errors import DataError

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_MEMBER_BYTES = 1 << 26
MEMBER_PATTERN = re.compile(rb"([0-9]{9})\.(rgb|png|jpg|json|txt)")
CHUNK_BYTES = 1 << 20
INDEX_VERSION = "v1.2"


@runtime_checkable
class Readable(Protocol):
    """All that we ask of a stream."""

    def read(self, size: int, /) -> bytes: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@functools.lru_cache(maxsize=1024)
def _header_around_name(size: int, name_bytes: int) -> tuple[bytes, int]:
    """Everything of a header that does not depend on the name (with spaces for the checksum), and its byte sum."""
    fields = (
        bytes(100 - name_bytes),
        b"0000644\0",  # mode
        b"0000000\0" * 2,  # uid, gid
        b"%011o\0" % size,
        b"%011o\0" % 0,  # mtime
        b" " * 8,  # checksum, counted as spaces
        b"0",  # a regular file
        bytes(100),  # link name
        b"ustar\x0000",
        bytes(64),  # user and group name
        b"0000000\0" * 2,  # device numbers
        bytes(155 + 12),  # prefix, padding
    )
    rest = b"".join(fields)
    return rest, sum(rest)


def ustar_header(name: str, size: int) -> bytes:
    """The 512 header bytes of a regular file: mode 0644, owner 0, time 0.

    Source: POSIX.1-1988 ustar interchange format.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100 or not 0 <= size < 8**11:
        raise ValueError(f"cannot be told in a ustar header: {name!r}, {size} bytes")
    rest, rest_sum = _header_around_name(size, len(encoded))
    at = 148 - len(encoded)
    return b"%b%b%06o\0 %b" % (encoded, rest[:at], rest_sum + sum(encoded), rest[at + 8 :])


def ustar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one file."""
    return b"".join((ustar_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES)))


def read_members(buffer: memoryview, *, where: object, max_members: int) -> Iterator[Member]:
    """The members of one of our own shards, strictly: anything we would not have written is an error.

    Args:
        buffer: The whole tar.
        where: What to call it in errors.
        max_members: More members than this are refused before they are read.

    Raises:
        DataError: foreign header field, bad name or size, data beyond the end, non-zero padding, missing or dirty end.
    """
    offset = 0
    for _ in range(max_members):
        header = bytes(buffer[offset : offset + BLOCK_BYTES])
        if not header.strip(b"\0"):
            break
        member = _parse_header(header, offset, where=where)
        end = member.offset + padded(member.size)
        if end + len(END_OF_ARCHIVE) > len(buffer):
            raise DataError(
                "the shard ends in the middle of a member",
                where=f"{where}: {member.name}",
                expected=f"at least {end + len(END_OF_ARCHIVE):,} bytes",
                got=f"{len(buffer):,}",
            )
        if bytes(buffer[member.offset + member.size : end]).strip(b"\0"):
            raise DataError("the padding of a member is not zero", where=f"{where}: {member.name}")
        yield member
        offset = end
    if bytes(buffer[offset : offset + len(END_OF_ARCHIVE) + 1]) != END_OF_ARCHIVE:
        raise DataError("the shard does not end where it should", where=f"{where}: byte {offset:,}", expected="1,024 zero bytes")


def _parse_header(header: bytes, offset: int, *, where: object) -> Member:
    name, size_text = header[:100].rstrip(b"\0"), header[124:135]
    if not MEMBER_PATTERN.fullmatch(name):
        raise DataError(
            "a member of the shard has a foreign name",
            where=f"{where}: byte {offset:,}",
            expected="9 digits and .rgb, .png, .jpg, .json or .txt",
            got=name[:100],
        )
    size = int(size_text, 8) if re.fullmatch(rb"[0-7]{11}", size_text) else -1
    text = name.decode("ascii")
    if not 0 <= size <= MAX_MEMBER_BYTES or header != ustar_header(text, size):
        raise DataError(
            "a tar header is damaged", where=f"{where}: {text}", expected="the fixed fields and checksum that we write", got=header[:157]
        )
    return Member(text, offset + BLOCK_BYTES, size)


def index_text(samples: list[list[Member]]) -> bytes:
    """DALI's text index (v1.2): a line with the number of samples, then `extension offset size name` for each member.

    Source: `wds2idx` of nvidia-dali 2.4.
    """
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.name.split('.', 1)[1]} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    return ("\n".join(lines) + "\n").encode("ascii")


def stream_members(stream: Readable, wanted: set[str], *, where: object, max_total: int) -> dict[str, bytes]:
    """Read the files called `wanted` (last path component) out of anybody's tar stream, in memory.

    Only regular files are taken; links, devices and extended headers are passed over in bounded memory.

    Args:
        stream: The (decompressed) tar.
        wanted: File names without folders.
        where: What to call the archive in errors.
        max_total: Give up after this many bytes, so that a compressed bomb cannot run for ever.

    Raises:
        DataError: not a tar, damaged, two files of the same name, or over `max_total`.
    """
    found: dict[str, bytes] = {}
    read = 0
    while len(found) < len(wanted):
        header = _read_exactly(stream, BLOCK_BYTES, where=where)
        if not header.strip(b"\0"):
            break
        size = _foreign_size(header, where=where)
        read += BLOCK_BYTES + padded(size)
        if read > max_total:
            raise DataError("the archive is larger than any published one", where=where, expected=f"at most {max_total:,} bytes")
        name = PurePosixPath(header[:100].split(b"\0")[0].decode("latin-1")).name
        if header[156:157] in (b"0", b"\0") and name in wanted:
            if name in found:
                raise DataError("the archive holds a file twice", where=where, got=name)
            found[name] = _read_exactly(stream, size, where=where)
            _skip(stream, padded(size) - size, where=where)
        else:
            _skip(stream, padded(size), where=where)
    while read <= max_total and (rest := stream.read(CHUNK_BYTES)):  # to its end, where a compressed stream keeps its checksum
        read += len(rest)
    return found


def _foreign_size(header: bytes, *, where: object) -> int:
    """The checked size field of a header written by somebody else."""
    checksum = re.fullmatch(rb"[ \0]*([0-7]+)[ \0]*", header[148:156])
    size = re.fullmatch(rb" *([0-7]+)[ \0]*", header[124:136])
    if not checksum or not size or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise DataError("this is not a tar archive, or it is damaged", where=where)
    return int(size[1], 8)


def _read_exactly(stream: Readable, size: int, *, where: object) -> bytes:
    pieces, missing = [], size
    while missing and (piece := stream.read(min(missing, CHUNK_BYTES))):
        pieces.append(piece)
        missing -= len(piece)
    if missing:
        raise DataError("the archive is truncated", where=where, expected=f"{missing:,} more bytes")
    return b"".join(pieces)


def _skip(stream: Readable, size: int, *, where: object) -> None:
    while size:
        size -= len(_read_exactly(stream, min(size, CHUNK_BYTES), where=where))
