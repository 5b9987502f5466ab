"""Everything that depends on where the tensors live; the only module of the training rooms with CUDA-only lines."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch
from torch import Tensor

from pairclip_fast.allocator import give_back_memory
from pairclip_fast.data.loader import Batch
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.models import tower
from pairclip_fast.telemetry.memory import MemoryReading, host_reading, reset_host_peak
from pairclip_fast.telemetry.nvml import NvmlMemory

GIB = 2**30
CUDA_GUARD_STEPS = 32
"""Steps between two looks at the finite-number guard on CUDA: a look waits for the device to finish its queue."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A device and how to use it."""

    device: torch.device
    description: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def guard_steps(self) -> int:
        """Steps between two reads of a device flag; reading costs nothing on a CPU."""
        return CUDA_GUARD_STEPS if self.is_cuda else 1

    def configure(self) -> None:
        """Process-wide switches, set once by the runner: autotuned convolutions and TF32 outside of autocast."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")

    def move(self, batch: Batch) -> Batch:
        """`batch` on this device; from the CPU through pinned memory, so that the copy overlaps with computing."""
        if batch.images.device.type == self.device.type:
            return batch
        return batch.map(lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))

    def synchronise(self) -> None:
        """Wait until the device has done what was queued."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """A point in the device's time, for `seconds_between`: the host's clock, or on CUDA an event behind all that was queued."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """From one mark to a later one; on CUDA both must have been reached."""
        return float(earlier.elapsed_time(later)) / 1e3 if self.is_cuda else later - earlier

    def memory(self) -> dict[str, float]:
        """Memory of torch's allocator on the device, in GiB; empty on a CPU."""
        if not self.is_cuda:
            return {}
        return {
            "cuda_allocated_gib": torch.cuda.memory_allocated(self.device) / GIB,
            "cuda_reserved_gib": torch.cuda.memory_reserved(self.device) / GIB,
            "cuda_peak_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
        }

    def memory_reading(self) -> MemoryReading:
        """Of the device's memory, or of the host's where that is the device."""
        if not self.is_cuda:
            reading = host_reading()
            allocated = None if reading.allocated is None else reading.allocated - tower.free_workspace_bytes()
            return dataclasses.replace(reading, allocated=allocated)
        self.synchronise()
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return MemoryReading(
            allocated=torch.cuda.memory_allocated(self.device),
            reserved=reserved,
            peak=torch.cuda.max_memory_reserved(self.device),
            outside=total - free - reserved,
        )

    def give_back(self) -> None:
        """Return memory that is kept but free to the system: blocks of one size are of no use to the next task of another."""
        if self.is_cuda:
            self.synchronise()
            torch.cuda.empty_cache()
        else:
            tower.drop_free_workspaces()
            give_back_memory()

    def forget_memory_peak(self) -> None:
        """Give free memory back, and count the peak anew."""
        self.give_back()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_host_peak()

    def nvml(self, *, events: EventLog) -> NvmlMemory | None:
        """The driver's view of the device's memory; None on a CPU."""
        return NvmlMemory(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}", events=events) if self.is_cuda else None

    def generator_states(self) -> dict[str, Tensor]:
        """States of torch's generators as uint8 tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self.is_cuda:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_generator_states(self, states: dict[str, Tensor]) -> None:
        """Continue the generators; a state for a device that is not used now is left out."""
        torch.set_rng_state(states["cpu"])
        if self.is_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def choose_device(name: str, *, local_rank: int = 0, events: EventLog) -> Placement:
    """The device that `name` (auto, cpu, cuda) stands for on this machine.

    Raises:
        EnvironmentLackingError: `cuda` was asked for and there is none, or this process is one too many for the GPUs.
    """
    if name != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise EnvironmentLackingError(
                "there are more processes than GPUs",
                where=f"process {local_rank} of this machine",
                expected=f"at most {count} processes, one for each GPU",
                fix=f"start torchrun with --nproc-per-node={count}",
            )
        device = torch.device("cuda", local_rank)
        return Placement(device, torch.cuda.get_device_name(device))
    if name == "cuda":
        raise EnvironmentLackingError(
            "no usable CUDA device", where="--device cuda", got=_cuda_lack(), fix="use --device auto, or run `pairclip-fast doctor`"
        )
    if name == "auto":
        events.fallback("device", chosen="cpu", reason=_cuda_lack())
    return Placement(torch.device("cpu"), f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores")


def supports_fused_adam(parameter: Tensor) -> bool:
    """Whether torch has a fused Adam kernel for this parameter."""
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def _cuda_lack() -> str:
    """Why there is no CUDA device, in torch's words if it has some: a driver that is too old is no missing GPU."""
    if not torch.version.cuda:
        return "this torch was built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". Please")[0].strip()
        return "no CUDA device found" if "no NVIDIA driver" in reason else reason
    return "no CUDA device found"
