"""Streams of batches to measure: our loader in every form, each checked against `data.augment` before it is timed.

A stream is endless (epoch after epoch), prefetches as it would in a training, and yields tensors whose every value the
benchmark reads. Three rungs, never mixed: `read` (decoded bytes), `normalise`, `full` (the whole augmentation).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import loader as loader_room
from pairclip_fast.data.augment import augment_tiles
from pairclip_fast.data.backends.executor import Executor
from pairclip_fast.data.backends.mapped import MappedExecutor
from pairclip_fast.data.backends.native import NativeExecutor
from pairclip_fast.data.backends.reference import ReferenceExecutor
from pairclip_fast.data.bad_records import BadRecords
from pairclip_fast.data.loader import Batch, PlannedLoader
from pairclip_fast.data.parameters import own_tiles, parameter_table
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.native import native

CPU = torch.device("cpu")
FULL = AugmentConfig(rotate_degrees=15.0, brightness=0.2, contrast=0.2, saturation=0.2, flip_probability=0.5)
"""The augmentation of the `full` rung."""
RUNGS = ("read", "normalise", "full")
SEED = 0
TOLERANCE = {"native": 0.02, "twin": 0.0, "reference": 0.0, "dali": 0.25, "bfloat16": 1.0}
"""In units of the 0..255 scale (design, section 3.4); bfloat16: one unit in its last place of the largest value, 2^-8 * 255."""
JPEG_TOLERANCE = 8.0
"""JPEG decoders may differ by a rounding or two, which contrast and brightness double."""
READING = "reading alone"
READY_BATCHES = 16
"""100 MB at a batch size of 256: they do not stay in the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One row to measure."""

    name: str
    encoding: str
    rung: str
    threads: int
    batches: Iterator[Tensor]
    close: Callable[[], None]
    first_batch_s: float
    """From opening to the first batch, with everything imported."""
    same_maths: bool
    """Whether its pictures were compared with ours; otherwise it does comparable work with random numbers of its own."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """One of our loaders."""

    backend: str
    threads: int
    isa: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        suffix = " bf16" if self.dtype == torch.bfloat16 else ""
        return f"{self.backend}{' ' + self.isa if self.isa else ''}{suffix}"

    def executor(self, reader: ShardReader, *, augment: AugmentConfig | None, batch_size: int, events: EventLog) -> Executor:
        """The backend with these settings."""
        if self.backend == "native":
            return NativeExecutor(reader, augment=augment, device=CPU, num_threads=self.threads, isa=self.isa, dtype=self.dtype)
        if self.backend == "twin":
            return MappedExecutor(reader, augment=augment, device=CPU, num_threads=self.threads)
        if self.backend == "reference":
            return ReferenceExecutor(reader, augment=augment, device=CPU, events=events)
        from pairclip_fast.data.backends.dali import DaliExecutor

        return DaliExecutor(reader, augment=augment, batch_size=batch_size, device=CPU, num_threads=self.threads)

    def open(self, folder: Path, *, augment: AugmentConfig | None, batch_size: int, events: EventLog) -> PlannedLoader:
        """A loader over the train split."""
        reader = ShardReader(folder, "train", events=events)
        plan = Plan(num_samples=len(reader), batch_size=batch_size, seed=SEED)
        executor = self.executor(reader, augment=augment, batch_size=batch_size, events=events)
        bad_records = BadRecords(reader, policy="raise", events=events)
        return PlannedLoader(executor, reader=reader, plan=plan, augment=augment, device=CPU, bad_records=bad_records)


def our_variants(*, cores: int) -> list[Ours]:
    """Every form of our loader that this machine can run."""
    threads = sorted({1, 2, cores})
    variants: list[Ours] = []
    module = native().module
    if module is not None:
        isas = list(reversed(module.loader_isas()))
        variants += [Ours(backend="native", isa=isa, threads=count) for isa in isas for count in threads]
        variants.append(Ours(backend="native", isa=isas[0], threads=2, dtype=torch.bfloat16))
    variants += [Ours(backend="twin", threads=2), Ours(backend="reference", threads=2)]
    if loader_room.dali_installed():
        variants.append(Ours(backend="dali", threads=2))
    return variants


def our_stream(ours: Ours, folder: Path, *, encoding: str, rung: str, batch_size: int, events: EventLog) -> Stream:
    """A checked stream of one of our loaders.

    Raises:
        NumericsError: its pictures are not those of `data.augment`.
    """
    import time

    torch.set_num_threads(ours.threads)  # the twin's and the reference's own
    augment = FULL if rung == "full" else None
    started = time.perf_counter()
    loader = ours.open(folder, augment=augment, batch_size=batch_size, events=events)
    batch = next(iter(loader))
    first_batch_s = time.perf_counter() - started
    worst = verify(batch, folder, augment=augment)
    key = "bfloat16" if ours.dtype == torch.bfloat16 else ours.backend
    tolerance = JPEG_TOLERANCE if encoding == "jpeg" else TOLERANCE[key]
    if not worst <= tolerance:
        raise NumericsError("a loader makes other pictures", where=ours.name, expected=f"within {tolerance} of 255", got=worst)
    return Stream(
        name=f"ours: {ours.name}",
        encoding=encoding,
        rung=rung,
        threads=ours.threads,
        batches=(each.images for each in endless(loader)),
        close=loader.close,
        first_batch_s=first_batch_s,
        same_maths=True,
        facts={
            "largest_difference": worst,
            "unique_ids": unique_ids(loader),
            "resume_ms": resume_ms(loader),
            "state_bytes": len(json.dumps(loader.state_dict())),
        },
    )


def ready_stream(*, rung: str, batch_size: int) -> Stream:
    """Batches that are there already: what reading them costs, which is in every row and is nobody's loader."""
    images = [torch.randn(batch_size, 3, 32, 64) for _ in range(READY_BATCHES)]
    return Stream(
        name=READING,
        encoding="",
        rung=rung,
        threads=1,
        batches=itertools.cycle(images),
        close=lambda: None,
        first_batch_s=0.0,
        same_maths=True,
    )


def verify(batch: Batch, folder: Path, *, augment: AugmentConfig | None) -> float:
    """Largest difference from the pictures that `data.augment` makes of the same samples, in units of 0..255."""
    with ShardReader(folder, "train") as reader:
        ids, manifest = batch.sample_ids.numpy(), reader.manifest
        sources = own_tiles(ids, tiles=manifest.tiles)
        tile_size = (manifest.tile_height, manifest.tile_width)
        table = parameter_table(ids, sources, tile_size=tile_size, seed=SEED, epoch=0, augment=augment)
        tiles = torch.from_numpy(reader.tiles_of(ids).transpose(0, 1, 4, 2, 3).copy())
        expected = augment_tiles(tiles, torch.from_numpy(table), mean=manifest.mean, std=manifest.std)
        scale = torch.tensor(manifest.std).view(3, 1, 1)
        if not torch.equal(batch.caption_ids, torch.from_numpy(reader.caption_ids[ids])):
            raise NumericsError("captions of other samples", where=folder)
    return float(((batch.images.float() - expected) * scale).abs().max())


def endless(loader: PlannedLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


def unique_ids(loader: PlannedLoader, *, epochs: int = 2) -> list[int]:
    """Distinct samples of each epoch; the pictures are made as well."""
    loader.set_epoch(0)
    counts = [len(np.unique(torch.cat([batch.sample_ids for batch in loader]).numpy())) for _ in range(epochs)]
    loader.set_epoch(0)
    return counts


def resume_ms(loader: PlannedLoader, *, repeats: int = 5) -> float:
    """Median milliseconds from a state to its first batch, at a new place each time."""
    import time

    import timing

    state, size = loader.state_dict(), loader._plan.batch_size
    seconds = []
    for repeat in range(repeats):
        started = time.perf_counter()
        loader.load_state_dict({**state, "epoch": 100 + repeat, "cursor": 3 * size})
        next(iter(loader))
        seconds.append(time.perf_counter() - started)
    loader.set_epoch(0)
    return 1e3 * timing.spread(seconds).median
