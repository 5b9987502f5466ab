"""What the NVIDIA driver says about its GPUs; the only importer of `pynvml` (package nvidia-ml-py).

NVML sees the machine, torch sees what this process may use; they can differ (CUDA_VISIBLE_DEVICES, containers, a wheel
without CUDA). NVML also fails in more ways than it works: no library, no driver, no permission, calls that a GPU or a
virtual GPU does not support, a GPU that fell off the bus. So every value is optional, and every absence has a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from pairclip_fast.events import EventLog

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


class NvmlMemory:
    """Memory in use on one GPU, asked again and again during a run.

    What cannot be read is left out of the readings, and its reason is told once: a GPU that falls off the bus in the middle of
    a run costs a column, not the run.

    Args:
        uuid: The GPU as the driver names it (`GPU-...` or `MIG-...`): NVML's order is not CUDA's.
        events: Told once per value why it is missing.
    """

    def __init__(self, uuid: str, *, events: EventLog) -> None:
        self._events = events
        self._pynvml: Any = None
        self._handle: Any = None
        try:
            import pynvml
        except (ImportError, OSError) as error:
            self._tell("memory of the GPU", f"the module pynvml (package nvidia-ml-py) cannot be imported: {error}")
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._tell("memory of the GPU", _reason(error))
            return
        self._pynvml = pynvml
        self._handle, reason = _ask(pynvml, lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if reason is not None:
            self._tell("memory of the GPU", reason)

    def reading(self) -> dict[str, float]:
        """`nvml_used_gib` (all programs on the GPU) and `nvml_process_gib` (this one: torch's pool, CUDA context, DALI); each if known."""
        if self._handle is None:
            return {}
        used, why_not_used = _ask(self._pynvml, lambda: self._pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        if why_not_used is not None:
            self._tell("memory of the GPU", why_not_used)
            self._handle = None  # a lost GPU does not come back, and asking it can take seconds
            return {}
        own, why_not_own = _ask(self._pynvml, self._own_bytes)
        if why_not_own is not None:
            self._tell("memory of this process on the GPU", why_not_own)
        values = {"nvml_used_gib": used, "nvml_process_gib": own}
        return {name: value / GIB for name, value in values.items() if value is not None}

    def close(self) -> None:
        """Let go of the driver. Safe to call twice."""
        if self._pynvml is not None:
            with contextlib.suppress(self._pynvml.NVMLError):
                self._pynvml.nvmlShutdown()
        self._pynvml = self._handle = None

    def _own_bytes(self) -> int | None:
        """None in a container with process ids of its own, and where the driver does not account by process."""
        processes = self._pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)

    def _tell(self, what: str, reason: str) -> None:
        self._events.fallback(f"NVML: {what}", chosen="not recorded", reason=reason)


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
    """The answer, or None and the reason. A driver older than a call lacks its symbol; the bindings have two errors for that."""
    try:
        return call(), None
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        return None, _reason(error)
    except UnicodeDecodeError as error:
        return None, f"unreadable answer: {error}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__.replace('NVMLError_', 'NVML ')}: {error}"


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value
