"""The split in GPU memory, gathered and augmented by one kernel; where that kernel cannot run, by plain torch.

50,000 pairs are 307 MB. Triton is imported here and not before.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.executor import Executor
from pairclip_fast.data.backends.reference import ReferenceExecutor
from pairclip_fast.data.backends.selfcheck import SAMPLES, why_not
from pairclip_fast.data.parameters import Draw
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.upload import Uploads
from pairclip_fast.events import EventLog

TOLERANCE = 0.02
"""In units of the 0..255 scale (design, section 3.4)."""


class ResidentExecutor:
    """The pixels of a reference executor under the kernel; see `DrawingExecutor`."""

    name = "resident"

    def __init__(self, reference: ReferenceExecutor) -> None:
        self.bytes_read, self.helper_cpu_s = reference.bytes_read, 0.0
        self._reference, self._uploads = reference, Uploads(reference.tiles.device)

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        return self._reference.fill(sources, table)

    def fill_drawn(self, draw: Draw) -> Float32[Tensor, "batch 3 height width"]:
        from pairclip_fast.data.backends.triton_tiles import augment_resident

        self._reference.check(draw.sources)
        tiles, mean, std = self._reference.tiles, self._reference.mean, self._reference.std
        sources, ids = (self._uploads(torch.from_numpy(np.ascontiguousarray(numbers))) for numbers in (draw.sources, draw.ids))
        settings = {"epoch": draw.epoch, "seed": draw.seed, "partner": draw.partner, "augment": draw.augment or AugmentConfig()}
        return augment_resident(tiles, sources, ids, mean=mean, std=std, **settings)  # type: ignore[arg-type]

    def close(self) -> None:
        self._reference.close()


def resident_executor(reader: ShardReader, *, augment: AugmentConfig | None, device: torch.device, events: EventLog) -> Executor:
    """The split on `device`, with the kernel if it works there."""
    reference = ReferenceExecutor(reader, augment=augment, device=device, events=events)
    resident = ResidentExecutor(reference)
    reason = why_no_kernel(resident, reader=reader, augment=augment)
    if reason is None:
        return resident
    events.fallback("resident loader", chosen="torch operations", reason=reason)
    return reference


def why_no_kernel(resident: ResidentExecutor, *, reader: ShardReader, augment: AugmentConfig | None) -> str | None:
    """Why the kernel cannot be used; None if it makes the pictures that torch makes."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"

    def plain(draw: Draw) -> Tensor:
        return resident.fill(draw.sources, draw.table())

    same = {"like": plain, "reader": reader, "augment": augment}
    return why_not(resident.fill_drawn, **same, moves=True, tolerance=TOLERANCE, samples=SAMPLES)  # type: ignore[arg-type]
