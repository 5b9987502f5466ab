"""The reference backend: webdataset reads the shards, Pillow decodes them, `data.augment` does the rest.

It is the oracle of the other backends and needs nothing but torch. All pixels stay in memory as uint8 (6 kB per pair of
32x32 tiles), so the shards are read once and every later batch is a gather. On a GPU the pixels live there, and
`resident` puts one kernel in the place of the augmentation.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import augment_tiles
from pairclip_fast.data.manifest import REBUILD
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog


class ReferenceExecutor:
    """Whole split in memory; see `Executor`."""

    name = "reference"

    def __init__(self, reader: ShardReader, *, augment: AugmentConfig | None, device: torch.device, events: EventLog) -> None:
        self.bytes_read, self.helper_cpu_s = 0, 0.0
        self._bad: dict[int, BadRecordError] = {}
        self._border = (augment or AugmentConfig()).border
        self.mean, self.std = reader.manifest.mean, reader.manifest.std
        self.tiles = self._read(reader, events).to(device)
        """uint8 [sources, 3, height, width]: planes, so that rows of pixels are copied and not single bytes."""

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        self.check(sources)
        tiles = self.tiles.index_select(0, torch.from_numpy(sources.ravel()).to(self.tiles.device))
        tiles = tiles.view(*sources.shape, *tiles.shape[1:])
        return augment_tiles(tiles, torch.from_numpy(table), border=self._border, mean=self.mean, std=self.std)

    def check(self, sources: Int64[np.ndarray, "batch tiles"]) -> None:
        """Raise for the first sample that could not be read.

        Raises:
            BadRecordError: there is one among `sources`.
        """
        for sample_id in np.unique(sources // sources.shape[1]).tolist() if self._bad else ():
            if sample_id in self._bad:
                raise self._bad[sample_id]

    def close(self) -> None:
        self.tiles = self.tiles[:0].clone()

    def _read(self, reader: ShardReader, events: EventLog) -> UInt8[Tensor, "sources 3 height width"]:
        manifest = reader.manifest
        tiles = np.empty((len(reader), manifest.tiles, 3, manifest.tile_height, manifest.tile_width), dtype=np.uint8)
        position = 0
        progress = events.progress(f"reading {reader.split}", len(reader), unit="pairs")
        with contextlib.closing(_samples(reader)) as samples, progress as advance:
            for sample in samples:
                where = f"{sample['__url__']}: {sample['__key__']}"
                if position == len(reader) or manifest.extension not in sample or sample["__key__"] != f"{position:09d}":
                    expected = f"{position:09d}.{manifest.extension}" if position < len(reader) else f"{len(reader)} samples"
                    got = ", ".join(key for key in sample if not key.startswith("__"))
                    raise DataError("a shard does not match the manifest", where=where, expected=expected, got=got, fix=REBUILD)
                try:
                    decoded = reader.decoded(position, memoryview(sample[manifest.extension]))
                    tiles[position] = decoded.transpose(0, 3, 1, 2)
                except BadRecordError as error:  # told when the sample is asked for, as by every other backend
                    self._bad[position] = error
                self.bytes_read += len(sample[manifest.extension])
                position += 1
                advance(1)
        if position != len(reader):
            raise DataError("samples are missing", where=reader.split, expected=len(reader), got=position, fix=REBUILD)
        return torch.from_numpy(tiles).flatten(0, 1)


def _samples(reader: ShardReader) -> Generator[dict[str, Any], None, None]:
    """The samples of all shards in write order, as webdataset sees them.

    Its `WebDataset` would split the shards among ranks (ours comes from the plan: every rank holds the whole split) and
    leave the files open; the two stages below it do neither.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for path in reader.shard_paths:
        try:
            with path.open("rb") as stream:
                yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError("a shard cannot be read", where=path, got=error, fix=REBUILD) from error
