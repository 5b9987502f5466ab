"""Raw tiles straight out of the mapped shards, gathered by source without a loop over samples.

A raw record is tile after tile, so every tile is `tile_bytes` long at a known offset, and a batch is one indexing operation
per shard over overlapping windows of the mapping. Nothing is held in memory but the page cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.data.shards import ShardReader


class RawTiles:
    """Random access to the tiles of a split with raw records.

    Args:
        reader: The split.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader, self._shape = reader, reader.tile_shape[1:]
        self._tiles = reader.tile_shape[0]
        self._tile_bytes = int(np.prod(self._shape))
        self._windows = [np.lib.stride_tricks.sliding_window_view(shard, self._tile_bytes) for shard in reader.shard_bytes()]

    def gather(self, sources: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [*sources.shape, height, width, 3], a fresh array.

        Raises:
            BadRecordError: a record has changed, or is of another size.
        """
        ids, tile = np.divmod(sources.ravel(), self._tiles)
        self._reader.check(ids)
        shards = np.searchsorted(self._reader.shard_starts, ids, side="right") - 1
        offsets = self._reader.records.offsets[ids] + tile * self._tile_bytes
        out = np.empty((len(ids), self._tile_bytes), dtype=np.uint8)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            out[rows] = self._windows[shard][offsets[rows]]
        return out.reshape(*sources.shape, *self._shape)

    def close(self) -> None:
        """Let go of the shards."""
        self._windows = []
