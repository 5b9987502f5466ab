"""Memory of this process on the host: in use, resident, at its peak. What a system does not tell is None, never 0.

`allocated` is what programs call memory in use: on the host it comes from glibc's own count, the counterpart of
`torch.cuda.memory_allocated`. `reserved` is what the allocator holds from the system: resident memory here. A reading takes
some microseconds; the proportional share (`host_pss`) takes tens of milliseconds and is read once per run.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

GIB = 2**30
STATUS, CLEAR_REFS, SMAPS_ROLLUP = (Path("/proc/self") / name for name in ("status", "clear_refs", "smaps_rollup"))
RESET_PEAK = "5"
"""Written to clear_refs: count the peak of the resident memory anew (proc(5))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """One look at a device's memory, in bytes."""

    allocated: int | None
    """In use by tensors and other objects."""
    reserved: int | None
    """Held from the system: resident memory, or the caching allocator's pool."""
    peak: int | None
    """Most that was held since the last reset: resident on the host, reserved on a GPU."""
    outside: int | None = None
    """Of a GPU, what torch's pool does not hold: contexts, pools of other libraries, other programs."""


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


def host_reading() -> MemoryReading:
    """This process's memory on the host."""
    return MemoryReading(allocated=_malloc_bytes(), reserved=_field(STATUS, "VmRSS"), peak=_field(STATUS, "VmHWM"))


def reset_host_peak() -> bool:
    """Let the kernel count the peak anew; False where that is not allowed (the peak then goes back to the start)."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def host_pss() -> int | None:
    """Resident memory with shared pages divided by their sharers: what several processes may be added up by."""
    return _field(SMAPS_ROLLUP, "Pss")


def host_memory() -> dict[str, float]:
    """Resident memory now and at its peak (since the last reset), in GiB; a value that is not known is left out.

    Returns:
        `rss_gib` and `peak_rss_gib`.
    """
    import psutil

    reading = host_reading()
    rss = psutil.Process().memory_info().rss if reading.reserved is None else reading.reserved
    return {"rss_gib": rss / GIB} | ({} if reading.peak is None else {"peak_rss_gib": max(rss, reading.peak) / GIB})


def _malloc_bytes() -> int | None:
    """In use, by glibc's count; None with another C library."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def _field(path: Path, name: str) -> int | None:
    """Bytes of a `Name:  12 kB` line of a kernel file; None where there is none (not Linux)."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
