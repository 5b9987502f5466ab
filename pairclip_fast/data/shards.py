"""Random access to the samples of a split, over memory-mapped tars. Every loader backend reads through this.

Opening checks sizes and the digest of each index (a few MB), not of each tar: 50,000 pairs open in about 0.2 s. A flipped
bit inside a tar is `verify`'s business. An index that is lost or stale is rebuilt in memory, but only if the tar's own
digest still matches; nothing else is guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import mmap
import warnings
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from pairclip_fast.data.index import check_shard_size, parse_index, rebuild_index
from pairclip_fast.data.manifest import REBUILD, Manifest, ShardEntry, read_manifest
from pairclip_fast.data.sources.decode import PILLOW_ERRORS
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

Ints = npt.NDArray[np.int64]
PICTURE_FORMATS = {"png": ("PNG",), "jpeg": ("JPEG",)}


class CaptionFacts(msgspec.Struct):
    """What every sample's JSON member must have, whatever the kind of sample."""

    caption_id: int


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
        self.folder, self.split = Path(folder), split
        self.manifest: Manifest = read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise DataError("the data folder has no such split", where=folder, expected=", ".join(self.manifest.splits), got=split)
        entries = self.manifest.splits[split].shards
        self.shard_paths = [self.folder / split / entry.name for entry in entries]
        self.index_paths = [self.folder / split / entry.index_name for entry in entries]
        self.shard_starts: Ints = np.cumsum([0, *(entry.count for entry in entries)], dtype=np.int64)
        """int64 [shards + 1]: sample ids of shard k are shard_starts[k]..shard_starts[k + 1] - 1."""
        self.extensions = (self.manifest.extension, "json", "txt")
        parts = []
        for number, entry in enumerate(entries):
            check_shard_size(self.shard_paths[number], entry)
            lines = self._index(number, entry, events)
            parts.append(parse_index(lines, entry, int(self.shard_starts[number]), self.extensions, where=self.index_paths[number]))
        table = np.concatenate(parts)
        self.spans: dict[str, Spans] = {
            extension: Spans(np.ascontiguousarray(table[:, 2 * k]), np.ascontiguousarray(table[:, 2 * k + 1]))
            for k, extension in enumerate(self.extensions)
        }
        """Per extension, where its members lie."""
        self._maps: list[mmap.mmap] = []
        for path in self.shard_paths:
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._views = [memoryview(mapped) for mapped in self._maps]
        if events is not None:
            self._say_foreign_files(events)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def tile_shape(self) -> tuple[int, int, int, int]:
        """[tiles, height, width, 3] of a sample."""
        return (self.manifest.tiles, self.manifest.tile_height, self.manifest.tile_width, 3)

    def member(self, sample_id: int, extension: str) -> memoryview:
        """The bytes of one member of a sample, not copied."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self.shard_starts, sample_id, side="right")) - 1
        spans = self.spans[extension]
        offset = int(spans.offsets[sample_id])
        return self._views[shard][offset : offset + int(spans.sizes[sample_id])]

    def payload(self, sample_id: int) -> memoryview:
        """The bytes of the .rgb, .png or .jpg member, not copied."""
        return self.member(sample_id, self.manifest.extension)

    def tiles(self, sample_id: int) -> npt.NDArray[np.uint8]:
        """The decoded sample, uint8 [tiles, height, width, 3], a fresh array.

        Raises:
            DataError: the payload is damaged or of another size.
        """
        return decode_payload(self.payload(sample_id), self.manifest, where=f"{self.split} sample {sample_id}")

    def tiles_of(self, sample_ids: Ints) -> npt.NDArray[np.uint8]:
        """Several decoded samples, uint8 [n, tiles, height, width, 3].

        Raises:
            DataError: a payload is damaged or of another size.
        """
        out = np.empty((len(sample_ids), *self.tile_shape), dtype=np.uint8)
        for row, sample_id in enumerate(np.asarray(sample_ids).tolist()):
            out[row] = self.tiles(sample_id)
        return out

    @functools.cached_property
    def caption_ids(self) -> Ints:
        """int64 [N], from the JSON members; read at the first use (about 0.3 s for 50,000).

        Raises:
            DataError: a JSON member is damaged, or an id is out of range.
        """
        decoder = msgspec.json.Decoder(CaptionFacts)
        ids = np.empty(len(self), dtype=np.int64)
        for sample_id in range(len(self)):
            try:
                ids[sample_id] = decoder.decode(self.member(sample_id, "json")).caption_id
            except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeDecodeError) as error:
                raise DataError("a sample's JSON is damaged", where=f"{self.split} sample {sample_id}", got=error, fix=REBUILD) from error
        outside = (ids < 0) | (ids >= self.manifest.num_captions)
        if outside.any():
            first = int(np.argmax(outside))
            expected = f"0..{self.manifest.num_captions - 1}"
            raise DataError("a caption id is out of range", where=f"{self.split} sample {first}", expected=expected, got=int(ids[first]))
        return ids

    def close(self) -> None:
        """Unmap the shards; views that were handed out keep their own shard mapped. Safe to call twice."""
        for view, mapped in zip(self._views, self._maps, strict=True):
            with contextlib.suppress(BufferError):
                view.release()
                mapped.close()
        self._views, self._maps = [], []

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _say_foreign_files(self, events: EventLog) -> None:
        known = {path.name for path in (*self.shard_paths, *self.index_paths)}
        foreign = sorted(path.name for path in (self.folder / self.split).iterdir() if path.name not in known)
        if foreign:
            names = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            events.note(f"ignoring {len(foreign)} files that the manifest does not know: {self.split}/{names}")

    def _index(self, number: int, entry: ShardEntry, events: EventLog | None) -> bytes:
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
        if events is not None:
            events.fallback(f"index {self.split}/{path.name}", chosen="one rebuilt in memory from the intact shard", reason=problem)
        return lines


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
    tiles, height, width, _ = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a bomb, whose size we judge ourselves
        try:
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS[manifest.encoding])
            if picture.size != (tiles * width, height) or picture.mode != "RGB":
                expected, got = f"{tiles * width} x {height} RGB", f"{picture.size[0]} x {picture.size[1]} {picture.mode}"
                raise DataError("a sample's picture has the wrong size", where=where, expected=expected, got=got)
            pixels = np.asarray(picture)
        except PILLOW_ERRORS as error:
            raise DataError("a sample's picture is damaged", where=where, got=error, fix=REBUILD) from error
    return np.ascontiguousarray(pixels.reshape(height, tiles, width, 3).transpose(1, 0, 2, 3))
