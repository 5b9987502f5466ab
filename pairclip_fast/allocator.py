"""Keep freed memory in the process: a CPU training step otherwise spends a good part of its time in page faults.

glibc gives blocks of more than 32 MB back to the system as soon as they are freed, so every step gets the memory of its
activations anew, one fault per 4 KB page. A program that does the same thing every step is better off keeping it: the
system time goes, and the peak of the resident memory stays until the end. It is a decision for a whole process, so the
programs make it (the command line, the benchmarks), not the library.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Names of `mallopt` settings (malloc.h of glibc)."""
NEVER = 2**31 - 1
GROWTH_BYTES = 256 * 2**20
"""How much more than asked for the heap grows by."""
RETURNED_BYTES, LARGEST_THRESHOLD = 256 * 2**10, 32 * 2**20
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


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside, glibc gives every freed block of 256 KiB or more back at once, so that a peak is what was in use.

    Otherwise holes that the next block does not fit into count too: a third of the peak of a step of a few large tensors.
    Afterwards the limit is the largest that glibc finds by itself (32 MiB). Not for a process that keeps what is freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
