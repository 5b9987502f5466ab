"""Raw tiles straight out of the mapped shards, gathered by source without a loop over samples.

A raw record is tile after tile, so every tile is `tile_bytes` long at a known offset, and a batch is one indexing operation
per shard over overlapping windows of the mapping. Nothing is held in memory but the page cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.data.backends.executor import sample_location
from pairclip_fast.data.manifest import REBUILD
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import DataError


class RawTiles:
    """Random access to the tiles of a split with raw records.

    Args:
        reader: The split; its shards are mapped once more.

    Raises:
        DataError: a record has another size than the manifest says.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._shape = reader.tile_shape[1:]
        self._tiles = reader.tile_shape[0]
        self._tile_bytes = int(np.prod(self._shape))
        spans = reader.spans[reader.manifest.extension]
        wrong = np.flatnonzero(spans.sizes != self._tiles * self._tile_bytes)
        if len(wrong):
            expected, got = f"{self._tiles * self._tile_bytes:,} bytes", f"{int(spans.sizes[wrong[0]]):,}"
            where = sample_location(reader, int(wrong[0]))
            raise DataError("a sample has the wrong size", where=where, expected=expected, got=got, fix=REBUILD)
        self._offsets, self._starts = spans.offsets, reader.shard_starts
        maps = [np.memmap(path, dtype=np.uint8, mode="r") for path in reader.shard_paths]
        self._windows = [np.lib.stride_tricks.sliding_window_view(mapped, self._tile_bytes) for mapped in maps]

    def gather(self, sources: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [*sources.shape, height, width, 3], a fresh array."""
        ids, tile = np.divmod(sources.ravel(), self._tiles)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        offsets = self._offsets[ids] + tile * self._tile_bytes
        out = np.empty((len(ids), self._tile_bytes), dtype=np.uint8)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            out[rows] = self._windows[shard][offsets[rows]]
        return out.reshape(*sources.shape, *self._shape)

    def close(self) -> None:
        """Unmap the shards."""
        self._windows = []
