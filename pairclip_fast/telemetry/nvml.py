"""What the NVIDIA driver says about its GPUs; the only importer of `pynvml` (package nvidia-ml-py).

NVML sees the machine, torch sees what this process may use; they can differ (CUDA_VISIBLE_DEVICES, containers, a wheel
without CUDA). NVML also fails in more ways than it works: no library, no driver, no permission, calls that a GPU or a
virtual GPU does not support, a GPU that fell off the bus. So every value is optional, and every absence has a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class NvmlDevice:
    """One GPU as the driver sees it; None where the driver would not say.

    Args:
        index: NVML's index (bus order, not CUDA's).
        memory_total_gib: Whole memory.
        memory_used_gib: In use by all processes.
        compute_capability: (major, minor).
        absent: Field name to reason, for the fields that are None.
    """

    index: int
    name: str | None
    memory_total_gib: float | None
    memory_used_gib: float | None
    compute_capability: tuple[int, int] | None
    absent: dict[str, str]


@dataclasses.dataclass(frozen=True)
class NvmlReading:
    """All GPUs, or the reason why there is nothing.

    Args:
        devices: In NVML's order; a GPU that cannot even be opened is there with every field None.
        driver_version: For example "575.57.08".
        reason: Why `devices` is empty, else None.
    """

    devices: tuple[NvmlDevice, ...]
    driver_version: str | None
    reason: str | None


def read_nvml() -> NvmlReading:
    """Ask the driver once and close it again. Never raises; takes milliseconds, or a second where the driver has to wake."""
    try:
        import pynvml
    except (ImportError, OSError) as error:
        return NvmlReading((), None, f"the module pynvml (package nvidia-ml-py) cannot be imported: {error}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NvmlReading((), None, _reason(error))
    try:
        driver_version, _ = _ask(pynvml, lambda: _text(pynvml.nvmlSystemGetDriverVersion()))
        count, reason = _ask(pynvml, lambda: int(pynvml.nvmlDeviceGetCount()))
        devices = tuple(_read_device(pynvml, index) for index in range(count or 0))
        return NvmlReading(devices, driver_version, reason if count is None else None if count else "the driver reports no GPU")
    finally:
        with contextlib.suppress(pynvml.NVMLError):  # the reading stands, however closing goes
            pynvml.nvmlShutdown()


def _read_device(pynvml: Any, index: int) -> NvmlDevice:
    handle, reason = _ask(pynvml, lambda: pynvml.nvmlDeviceGetHandleByIndex(index))
    if handle is None:
        fields = ("name", "memory_total_gib", "memory_used_gib", "compute_capability")
        return NvmlDevice(index, None, None, None, None, dict.fromkeys(fields, reason or "no handle"))
    absent: dict[str, str] = {}

    def field(name: str, call: Callable[[], Any]) -> Any:
        value, why = _ask(pynvml, call)
        if why is not None:
            absent[name] = why
        return value

    memory = field("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    why_no_memory = absent.pop("memory", None)
    if why_no_memory is not None:
        absent.update(memory_total_gib=why_no_memory, memory_used_gib=why_no_memory)
    return NvmlDevice(
        index=index,
        name=field("name", lambda: _text(pynvml.nvmlDeviceGetName(handle))),
        memory_total_gib=memory.total / GIB if memory is not None else None,
        memory_used_gib=memory.used / GIB if memory is not None else None,
        compute_capability=field("compute_capability", lambda: tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))),
        absent=absent,
    )


def _ask(pynvml: Any, call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The answer, or None and the reason. A driver older than a call lacks its symbol; NVML then raises an error of its own."""
    try:
        return call(), None
    except pynvml.NVMLError as error:
        return None, _reason(error)
    except UnicodeDecodeError as error:
        return None, f"unreadable answer: {error}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__.replace('NVMLError_', 'NVML ')}: {error}"


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value
