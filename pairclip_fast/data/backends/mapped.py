"""The native backend's twin, for installations without the C++ extension: the same records, read and augmented in Python.

It opens as fast and needs as little memory; the augmentation is that of `data.augment`, so a batch costs what the reference
backend's does, and gathering it from the mapped shards a few microseconds per pair more.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import augment_tiles
from pairclip_fast.data.backends.pictures import PictureStore
from pairclip_fast.data.backends.raw_tiles import RawTiles
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.upload import Uploads


class MappedExecutor:
    """Mapped shards, numpy and torch; see `Executor`."""

    name = "native (Python twin)"
    helper_cpu_s = 0.0

    def __init__(self, reader: ShardReader, *, augment: AugmentConfig | None, device: torch.device, num_threads: int) -> None:
        self._reader, self._uploads = reader, Uploads(device)
        self._border = (augment or AugmentConfig()).border
        self._raw_bytes_read = 0
        raw = reader.manifest.encoding == "raw"
        self._raw = RawTiles(reader) if raw else None
        self._pictures = None if raw else PictureStore(reader, num_threads=num_threads)

    @property
    def bytes_read(self) -> int:
        return self._raw_bytes_read if self._pictures is None else self._pictures.bytes_read

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        tiles = self._uploads(torch.from_numpy(self._tiles(sources)).permute(0, 1, 4, 2, 3).contiguous())
        manifest = self._reader.manifest
        return augment_tiles(tiles, torch.from_numpy(table), border=self._border, mean=manifest.mean, std=manifest.std)

    def close(self) -> None:
        for store in (self._raw, self._pictures):
            if store is not None:
                store.close()

    def _tiles(self, sources: Int64[np.ndarray, "batch tiles"]) -> UInt8[np.ndarray, "batch tiles height width 3"]:
        count = self._reader.manifest.tiles
        if self._pictures is not None:
            pictures, places = self._pictures.of(sources)
            height, stacked_width, channels = pictures.shape[1:]
            apart = pictures.reshape(len(pictures), height, count, stacked_width // count, channels)
            return apart[places // count, :, places % count]
        assert self._raw is not None
        tiles = self._raw.gather(sources)
        self._raw_bytes_read += tiles.nbytes
        return tiles
