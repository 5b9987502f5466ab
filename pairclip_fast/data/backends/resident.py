"""The split in GPU memory, gathered and augmented by one kernel; where that kernel cannot run, by plain torch.

50,000 pairs are 307 MB. Nobody could run the kernel on the GPU it now meets, so it first makes a few pictures that torch
makes too: an error or another picture costs one event with the reason, not the run. Triton is imported here and not before.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.executor import Executor
from pairclip_fast.data.backends.reference import ReferenceExecutor
from pairclip_fast.data.parameters import Draw, own_tiles
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.events import EventLog

CHECK_SAMPLES = 16
CHECK_EPOCHS = (0, 3)
REASON_LENGTH = 300
TOLERANCE = 0.02
"""In units of the 0..255 scale (design, section 3.4)."""


class ResidentExecutor:
    """The pixels of a reference executor under the kernel; see `DrawingExecutor`."""

    name = "resident"

    def __init__(self, reference: ReferenceExecutor) -> None:
        self.bytes_read, self.helper_cpu_s = reference.bytes_read, 0.0
        self._reference = reference

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        return self._reference.fill(sources, table)

    def fill_drawn(self, draw: Draw) -> Float32[Tensor, "batch 3 height width"]:
        from pairclip_fast.data.backends.triton_tiles import augment_resident

        self._reference.check(draw.sources)
        tiles, mean, std = self._reference.tiles, self._reference.mean, self._reference.std
        sources, ids = (_uploaded(numbers, tiles.device) for numbers in (draw.sources, draw.ids))
        settings = {"epoch": draw.epoch, "seed": draw.seed, "partner": draw.partner, "augment": draw.augment or AugmentConfig()}
        return augment_resident(tiles, sources, ids, mean=mean, std=std, **settings)  # type: ignore[arg-type]

    def close(self) -> None:
        self._reference.close()


def resident_executor(reader: ShardReader, *, augment: AugmentConfig | None, device: torch.device, events: EventLog) -> Executor:
    """The split on `device`, with the kernel if it works there."""
    reference = ReferenceExecutor(reader, augment=augment, device=device, events=events)
    resident = ResidentExecutor(reference)
    reason = why_not(resident, tile_shape=reader.tile_shape, std=reference.std, augment=augment)
    if reason is None:
        return resident
    events.fallback("resident loader", chosen="torch operations", reason=reason)
    return reference


def why_not(
    resident: ResidentExecutor, *, tile_shape: tuple[int, int, int, int], std: tuple[float, float, float], augment: AugmentConfig | None
) -> str | None:
    """Why the kernel cannot be used; None if it makes the pictures that torch makes."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    tiles, height, width, _ = tile_shape
    ids = np.zeros(CHECK_SAMPLES, dtype=np.int64)  # the first sample with the parameters of others
    sources = own_tiles(ids, tiles=tiles)[:, ::-1].copy()
    try:
        for epoch in CHECK_EPOCHS:
            draw = Draw(
                ids=np.arange(CHECK_SAMPLES), sources=sources, tile_size=(height, width), seed=epoch << 40, epoch=epoch, augment=augment
            )
            apart = resident.fill_drawn(draw).cpu() - resident.fill(sources, draw.table()).cpu()
            worst = float((apart * torch.tensor(std).view(3, 1, 1)).abs().max())
            if not worst <= TOLERANCE:  # NaN is not
                return f"it makes other pictures than torch ({worst:.3g} of 255 apart)"
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything; what is no fault of theirs comes back in torch
        return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON_LENGTH]}"
    return None


def _uploaded(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Through pinned memory, or the copy would wait for the training step."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
