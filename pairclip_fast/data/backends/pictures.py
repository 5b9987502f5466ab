"""Decoded pictures of PNG and JPEG records: kept if the whole split fits in memory, else for one batch.

Decoding a 64x32 picture costs several times its augmentation, and it gives the same pixels in every epoch. So each record is
decoded when it is first asked for, and kept (6 kB per pair of 32x32 tiles) unless the split would take more than a quarter of
the memory that is free at the start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray

from pairclip_fast.data.shards import ShardReader

MEMORY_SHARE = 0.25
"""Of the free memory, what the pictures of a split may take."""
Ints = NDArray[np.int64]
Pictures = NDArray[np.uint8]
Decode = Callable[[Ints, Ints, Pictures], list[int]]
"""Decodes samples into rows of an array; returns the ids that it could not do."""


class PictureStore:
    """Pictures of a split, uint8 [n, height, tiles * width, 3].

    Args:
        reader: The split.
        num_threads: Threads that Pillow may use.
        decode: A faster decoder; what it refuses, and everything without it, is decoded by Pillow, whose word is final.
        room_bytes: How much may be kept; None for a share of the free memory.
    """

    def __init__(self, reader: ShardReader, *, num_threads: int, decode: Decode | None = None, room_bytes: int | None = None) -> None:
        self.bytes_read = 0
        self._reader, self._decode = reader, decode
        tiles, height, width, channels = reader.tile_shape
        self._shape = (height, tiles * width, channels)
        room = psutil.virtual_memory().available * MEMORY_SHARE if room_bytes is None else room_bytes
        self.resident = len(reader) * int(np.prod(self._shape)) <= room
        """Whether every picture is kept once it was decoded."""
        self._kept = np.empty((len(reader) if self.resident else 0, *self._shape), dtype=np.uint8)
        self._there = np.zeros(len(reader), dtype=np.bool_)
        self._threads = ThreadPoolExecutor(num_threads, "pairclip-pillow") if num_threads > 1 else None

    def of(
        self, sources: Int64[np.ndarray, "batch tiles"]
    ) -> tuple[UInt8[np.ndarray, "n height width 3"], Int64[np.ndarray, "batch tiles"]]:
        """Pictures that hold the tiles `sources`, and where in these pictures they are, counted in the same way.

        Raises:
            BadRecordError: one of the records is damaged.
        """
        tiles = self._reader.manifest.tiles
        samples = np.unique(sources // tiles)
        if self.resident:
            wanted = samples[~self._there[samples]]
            self._fetch(wanted, wanted, self._kept)
            self._there[wanted] = True
            return self._kept, sources
        pictures = np.empty((len(samples), *self._shape), dtype=np.uint8)
        self._fetch(samples, np.arange(len(samples)), pictures)
        return pictures, np.searchsorted(samples, sources // tiles) * tiles + sources % tiles

    def close(self) -> None:
        """Give memory and threads back. Safe to call twice."""
        if self._threads is not None:
            self._threads.shutdown()
        self._kept = self._kept[:0].copy()

    def _fetch(self, samples: Ints, rows: Ints, pictures: Pictures) -> None:
        if not len(samples):
            return
        self.bytes_read += int(self._reader.records.sizes[samples].sum())
        left = samples if self._decode is None else np.array(self._decode(samples, rows, pictures), dtype=np.int64)
        chosen = rows[np.isin(samples, left)]
        run = map if self._threads is None else self._threads.map
        for _ in run(lambda sample, row: self._decode_one(sample, row, pictures), left.tolist(), chosen.tolist()):
            pass

    def _decode_one(self, sample_id: int, row: int, pictures: Pictures) -> None:
        pictures[row] = np.concatenate(list(self._reader.tiles(sample_id)), axis=1)


def usable_threads(*, world_size: int, most: int) -> int:
    """Threads for a loader of one of `world_size` processes, of which torchrun says how many are on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return min(most, max(1, len(os.sched_getaffinity(0)) // here))
