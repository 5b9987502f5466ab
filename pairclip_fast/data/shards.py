"""Random access to the samples of a split, over memory-mapped tars. Every loader backend reads through this.

Opening checks sizes and the record indices (`records`), not each tar: 50,000 pairs open in a few milliseconds. A flipped bit
in a payload is found by its checksum when the record is read; all else is `verify`'s business. An index that is lost or
stale is rebuilt in memory, but only if the tar's own digest still matches; nothing else is guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import mmap
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairclip_fast.data.index import check_shard_size, parse_index, rebuild_index
from pairclip_fast.data.manifest import REBUILD, Manifest, ShardEntry, read_manifest
from pairclip_fast.data.records import RecordIndex, StaleIndexError, read_record_index, rebuild_records
from pairclip_fast.data.sources.decode import PILLOW_ERRORS
from pairclip_fast.errors import DataError, EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.native import native

Ints = npt.NDArray[np.int64]
PICTURE_FORMATS = {"png": ("PNG",), "jpeg": ("JPEG",)}


class BadRecordError(DataError):
    """A sample that cannot be used: its bytes changed, or they are not a picture of the right size."""

    def __init__(self, what: str, *, sample_id: int, where: object, expected: object = None, got: object = None) -> None:
        self.sample_id = sample_id
        super().__init__(what, where=where, expected=expected, got=got, fix=f"{REBUILD}; a training can go on with --on-bad-record skip")


@dataclasses.dataclass(frozen=True, slots=True)
class Spans:
    """Where the members of one extension lie: byte offsets in their own tar, and sizes. Both int64 [N]."""

    offsets: Ints
    sizes: Ints


class ShardReader:
    """The samples 0..N-1 of one split, in the order in which they were written.

    Args:
        folder: A data folder.
        split: train, val or test.
        events: Told when an index had to be rebuilt; None to stay silent.

    Raises:
        DataError: no manifest, no such split, or a shard that is missing, truncated or not the manifest's.
    """

    def __init__(self, folder: Path, split: str, *, events: EventLog | None = None) -> None:
        self.folder, self.split, self._events = Path(folder), split, events
        self.manifest: Manifest = read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise DataError("the data folder has no such split", where=folder, expected=", ".join(self.manifest.splits), got=split)
        self._entries = self.manifest.splits[split].shards
        self.shard_paths = [self.folder / split / entry.name for entry in self._entries]
        self.index_paths = [self.folder / split / entry.index_name for entry in self._entries]
        self.shard_starts: Ints = np.cumsum([0, *(entry.count for entry in self._entries)], dtype=np.int64)
        """int64 [shards + 1]: sample ids of shard k are shard_starts[k]..shard_starts[k + 1] - 1."""
        self.extensions = (self.manifest.extension, "json", "txt")
        for path, entry in zip(self.shard_paths, self._entries, strict=True):
            check_shard_size(path, entry)
        self.records = self._record_index()
        """Payloads of all samples."""
        self._judged = np.zeros(len(self), dtype=np.bool_)
        self._maps = [_mapped(path) for path in self.shard_paths]
        self._views = [memoryview(mapped) for mapped in self._maps]
        if events is not None:
            self._say_foreign_files(events)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def tile_shape(self) -> tuple[int, int, int, int]:
        """[tiles, height, width, 3] of a sample."""
        return (self.manifest.tiles, self.manifest.tile_height, self.manifest.tile_width, 3)

    @property
    def caption_ids(self) -> Ints:
        """int64 [N]."""
        return self.records.caption_ids

    def shard_bytes(self) -> list[npt.NDArray[np.uint8]]:
        """Each shard's bytes, not copied; whoever holds them keeps the shard mapped."""
        return [np.frombuffer(view, dtype=np.uint8) for view in self._views]

    def location(self, sample_id: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard_paths[self._shard_of(sample_id)]}: {sample_id:09d}"

    def member(self, sample_id: int, extension: str) -> memoryview:
        """The bytes of one member of a sample, not copied."""
        shard, spans = self._shard_of(sample_id), self.spans[extension]
        offset = int(spans.offsets[sample_id])
        return self._views[shard][offset : offset + int(spans.sizes[sample_id])]

    def payload(self, sample_id: int) -> memoryview:
        """The bytes of the .rgb, .png or .jpg member, neither copied nor checked (`check`)."""
        shard = self._shard_of(sample_id)
        offset = int(self.records.offsets[sample_id])
        return self._views[shard][offset : offset + int(self.records.sizes[sample_id])]

    def tiles(self, sample_id: int) -> npt.NDArray[np.uint8]:
        """The checked and decoded sample, uint8 [tiles, height, width, 3], a fresh array.

        Raises:
            BadRecordError: the payload has changed, is damaged or of another size.
        """
        return self.decoded(sample_id, self.payload(sample_id))

    def check(self, sample_ids: Ints) -> None:
        """Compare payloads with their checksums, raw ones with their size; judge the headers of pictures, each the first time.

        For backends whose own decoders would make something of every kind of picture.

        Args:
            sample_ids: Of any shape; each is checked once.

        Raises:
            BadRecordError: one differs.
        """
        asked, raw = np.unique(sample_ids), self.manifest.encoding == "raw"
        suspect = self.records.sizes[asked] != np.prod(self.tile_shape) if raw else ~self._judged[asked]
        changed = np.isin(asked, self.native_records.damaged(asked)) if self.native_records is not None else np.ones_like(suspect)
        for sample_id in asked[suspect | changed].tolist():
            data = self.payload(sample_id)
            self._check_sum(sample_id, data)
            if not raw:
                with self._blaming(sample_id) as where:
                    open_picture(data, self.manifest, where=where)
                self._judged[sample_id] = True
            elif len(data) != np.prod(self.tile_shape):
                self.decoded(sample_id, data)

    def decoded(self, sample_id: int, data: memoryview) -> npt.NDArray[np.uint8]:
        """`tiles` of a payload that was read by somebody else.

        Raises:
            BadRecordError: the payload has changed, is damaged or of another size.
        """
        self._check_sum(sample_id, data)
        with self._blaming(sample_id) as where:
            return decode_payload(data, self.manifest, where=where)

    def tiles_of(self, sample_ids: Ints) -> npt.NDArray[np.uint8]:
        """Several decoded samples, uint8 [n, tiles, height, width, 3].

        Raises:
            BadRecordError: a payload has changed, is damaged or of another size.
        """
        out = np.empty((len(sample_ids), *self.tile_shape), dtype=np.uint8)
        for row, sample_id in enumerate(np.asarray(sample_ids).tolist()):
            out[row] = self.tiles(sample_id)
        return out

    @functools.cached_property
    def spans(self) -> dict[str, Spans]:
        """Per extension, where its members lie; from the text indices, read at the first use (0.2 s for 50,000 pairs)."""
        parts = []
        for number, entry in enumerate(self._entries):
            lines = self._text_index(number, entry)
            parts.append(parse_index(lines, entry, int(self.shard_starts[number]), self.extensions, where=self.index_paths[number]))
        table = np.concatenate(parts)
        return {
            extension: Spans(np.ascontiguousarray(table[:, 2 * k]), np.ascontiguousarray(table[:, 2 * k + 1]))
            for k, extension in enumerate(self.extensions)
        }

    @functools.cached_property
    def native_records(self) -> Any:
        """The records in C++, for whom checksums take a fraction of the time, without the interpreter lock; None without the extension."""
        module, records = native().module, self.records
        if module is None:
            return None
        return module.Records(self.shard_bytes(), self.shard_starts, records.offsets, records.sizes, records.checksums)

    def close(self) -> None:
        """Unmap the shards; views that were handed out keep their own shard mapped. Safe to call twice."""
        self.__dict__.pop("native_records", None)
        for view, mapped in zip(self._views, self._maps, strict=True):
            with contextlib.suppress(BufferError):
                view.release()
                mapped.close()
        self._views, self._maps = [], []

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_sum(self, sample_id: int, data: memoryview) -> None:
        """Judge a record's bytes, the mapped ones in C++ first: there a file that was cut short, or whose disk fails, does not end the
        process."""
        expected, got = int(self.records.checksums[sample_id]), None
        there = self.native_records is None or data.obj not in self._maps or self.native_records.checksum(sample_id) is not None
        if there and (got := zlib.crc32(data)) == expected:
            return
        what = "a record's bytes have changed" if there else "a record's bytes cannot be read: the shard was cut short, or its disk fails"
        wanted, found = f"CRC-32 {expected:08x}", None if got is None else f"{got:08x}"
        raise BadRecordError(what, sample_id=sample_id, where=self.location(sample_id), expected=wanted, got=found)

    @contextlib.contextmanager
    def _blaming(self, sample_id: int) -> Iterator[str]:
        """Where the sample is; what is found to be wrong there is then a bad record."""
        where = self.location(sample_id)
        try:
            yield where
        except DataError as error:
            raise BadRecordError(error.what, sample_id=sample_id, where=where, expected=error.expected, got=error.got) from error

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return int(np.searchsorted(self.shard_starts, sample_id, side="right")) - 1

    def _say_foreign_files(self, events: EventLog) -> None:
        known = {name for entry in self._entries for name in (entry.name, entry.index_name, entry.records_name)}
        foreign = sorted(path.name for path in (self.folder / self.split).iterdir() if path.name not in known)
        if foreign:
            names = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            events.note(f"ignoring {len(foreign)} files that the manifest does not know: {self.split}/{names}")

    def _record_index(self) -> RecordIndex:
        """The record indices of all shards; those that are missing or stale are derived from their intact tars."""
        parts, stale = [], []
        for path, entry in zip(self.shard_paths, self._entries, strict=True):
            try:
                parts.append(read_record_index(path.with_name(entry.records_name), entry, num_captions=self.manifest.num_captions))
            except StaleIndexError as error:
                stale.append(f"{entry.records_name}: {error}")
                parts.append(rebuild_records(path, entry, num_captions=self.manifest.num_captions))
        if stale and self._events is not None:
            reason = stale[0] + (f", and {len(stale) - 1} more" if len(stale) > 1 else "")
            chosen = "one rebuilt in memory from the intact shards"
            self._events.fallback(f"record index of {self.split}", chosen=chosen, reason=reason)
        return RecordIndex.of(np.concatenate(parts))

    def _text_index(self, number: int, entry: ShardEntry) -> bytes:
        """The index file's bytes if they are the manifest's, else the same made from the tar."""
        path, problem = self.index_paths[number], "it differs from the manifest"
        try:
            if path.stat().st_size == entry.index_bytes:
                lines = path.read_bytes()
                if hashlib.sha256(lines).hexdigest() == entry.index_sha256:
                    return lines
        except OSError as error:
            problem = error.strerror or str(error)
        lines = rebuild_index(self.shard_paths[number], entry)
        if self._events is not None:
            chosen = "one rebuilt in memory from the intact shard"
            self._events.fallback(f"index {self.split}/{path.name}", chosen=chosen, reason=problem)
        return lines


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise DataError("a shard cannot be read", where=path, got=error.strerror or error) from error
        what, fix = "more shards than the files that a process may have open", "raise the limit (ulimit -n), or write fewer, larger shards"
        raise EnvironmentLackingError(what, where=path, got=error.strerror, fix=fix) from error


def decode_payload(data: memoryview, manifest: Manifest, *, where: object) -> npt.NDArray[np.uint8]:
    """The tiles of one sample, uint8 [tiles, height, width, 3].

    Raises:
        DataError: the payload is damaged or of another size; a picture's header is judged before it is decoded.
    """
    shape = (manifest.tiles, manifest.tile_height, manifest.tile_width, 3)
    if manifest.encoding == "raw":
        if len(data) != int(np.prod(shape)):
            raise DataError("a sample has the wrong size", where=where, expected=f"{int(np.prod(shape)):,} bytes", got=f"{len(data):,}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()
    picture = open_picture(data, manifest, where=where)
    with _picture_errors(where):
        pixels = np.asarray(picture)
    tiles, height, width, _ = shape
    return np.ascontiguousarray(pixels.reshape(height, tiles, width, 3).transpose(1, 0, 2, 3))


def open_picture(data: memoryview, manifest: Manifest, *, where: object) -> Image.Image:
    """A sample's PNG or JPEG, of which only the header was read.

    Raises:
        DataError: it is none, of another size, or not RGB.
    """
    with _picture_errors(where):
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS[manifest.encoding])
    size = (manifest.tiles * manifest.tile_width, manifest.tile_height)
    if picture.size != size or picture.mode != "RGB":
        expected, got = f"{size[0]} x {size[1]} RGB", f"{picture.size[0]} x {picture.size[1]} {picture.mode}"
        raise DataError("a sample's picture has the wrong size", where=where, expected=expected, got=got)
    return picture


@contextlib.contextmanager
def _picture_errors(where: object) -> Iterator[None]:
    """Whatever Pillow raises is a damaged picture; its warning of a bomb is not wanted, as we judge the size ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except PILLOW_ERRORS as error:
            raise DataError("a sample's picture is damaged", where=where, got=error, fix=REBUILD) from error
