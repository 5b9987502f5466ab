"""Keep freed memory in the process: a CPU training step otherwise spends a good part of its time in page faults.

glibc gives blocks of more than 32 MB back to the system as soon as they are freed, so every step gets the memory of its
activations anew, one fault per 4 KB page. A program that does the same thing every step is better off keeping it: the
system time goes, and the peak of the resident memory stays until the end. It is a decision for a whole process, so the
programs make it (the command line, the benchmarks), not the library.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of `mallopt` settings (malloc.h of glibc)."""
NEVER = 2**31 - 1
GROWTH_BYTES = 256 * 2**20
"""How much more than asked for the heap grows by."""
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: GROWTH_BYTES}


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed. Call it before memory is used.

    Returns:
        Whether it was done: not with another C library (musl, macOS), nor when the user's environment sets malloc up.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in SETTINGS.items())


def give_back_memory() -> None:
    """Return what is kept but free to the system now; where there is no glibc, do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
