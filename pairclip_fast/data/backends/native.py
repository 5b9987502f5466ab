"""The native backend: the C++ core reads the mapped shards and writes finished batches, in one pass per tile.

Raw records are read where the page cache has them: nothing is decoded, copied or kept. The interpreter lock is free while a
batch is filled, by as many threads as the process has cores. A batch belongs to whoever refers to it; when nobody does any more,
its memory becomes a later batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.pictures import PictureStore
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.upload import Uploads
from pairclip_fast.errors import DataError, EnvironmentLackingError
from pairclip_fast.native import native


class NativeExecutor:
    """The C++ core; see `Executor`.

    Args:
        reader: The split.
        augment: For the border; the rest of the augmentation comes with each batch.
        device: Where the batches are wanted.
        num_threads: Threads that fill a batch.
        isa: Instruction set (portable, avx2, avx512, avx512_vbmi), if not the best one of this machine.
        dtype: float32 or bfloat16.
    """

    name = "native"

    def __init__(
        self,
        reader: ShardReader,
        *,
        augment: AugmentConfig | None,
        device: torch.device,
        num_threads: int,
        isa: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        module = native().module
        if module is None:
            raise EnvironmentLackingError("the C++ extension is not there", where="--loader native", got=native().reason)
        self.helper_cpu_s = 0.0
        self._reader, self._device, self._dtype, self._uploads = reader, device, dtype, Uploads(device)
        self._records: Any = reader.native_records
        manifest = reader.manifest
        self._filler = module.Filler(
            height=manifest.tile_height,
            width=manifest.tile_width,
            tiles=manifest.tiles,
            mean=manifest.mean,
            std=manifest.std,
            border=(augment or AugmentConfig()).border,
            bf16=dtype == torch.bfloat16,
            threads=num_threads,
            isa=isa,
        )
        self._raw_bytes_read = 0
        self._pictures: PictureStore | None = None
        if manifest.encoding != "raw":
            decode = self._decode if module.decoder_library(manifest.encoding) else None
            self._pictures = PictureStore(reader, num_threads=num_threads, decode=decode)

    @property
    def bytes_read(self) -> int:
        return self._raw_bytes_read if self._pictures is None else self._pictures.bytes_read

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float[Tensor, "batch 3 height width"]:
        assert self._records is not None, "fill after close"
        tiles, height, width, channels = self._reader.tile_shape
        if self._device.type == "cuda":  # torch keeps and reuses pinned memory
            images = torch.empty((len(sources), channels, height, tiles * width), dtype=self._dtype, pin_memory=True)
        else:
            images = self._filler.batch(len(sources))
        if self._pictures is None:
            seconds, damaged = self._filler.fill_records(self._records, sources, table, images)
            self._raw_bytes_read += sources.size * height * width * channels
        else:
            pictures, places = self._pictures.of(sources)
            seconds, damaged = self._filler.fill_pictures(pictures, places, table, images)
        self.helper_cpu_s += seconds
        if damaged:
            self._reader.tiles(damaged[0])  # raises, and says what is wrong with it
            raise DataError("a record cannot be read twice alike", where=self._reader.location(damaged[0]))
        return self._uploads(images)

    def close(self) -> None:
        self._records = None
        if self._pictures is not None:
            self._pictures.close()

    def _decode(self, samples: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"], pictures: np.ndarray) -> list[int]:
        seconds, damaged = self._filler.decode(self._records, self._reader.manifest.encoding, samples, rows, pictures)
        self.helper_cpu_s += seconds
        return list(damaged)
