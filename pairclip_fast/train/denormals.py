"""Denormal numbers count as zero while a run trains on a CPU.

Below 1.2e-38 float32 keeps numbers with fewer and fewer digits, and processors hand arithmetic on them to microcode. Attention
that is sure of itself and GELU's tails can make them by the million. Seen in one float32 run of `enhanced` (`benchmarks/accuracy.py`, two
cores with AVX-512): 55 pairs per second fell to about 20 until the third epoch, the time went into matrix products, and the same
checkpoint trained on at 65 with denormals as zeros. What is lost is far below the rounding of the sums that such numbers enter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals_as_zeros() -> Iterator[None]:
    """Flush results and inputs of float arithmetic, where the processor can (x86 with SSE3, ARM64).

    It is a state of each thread, which threads inherit from who starts them: enter before the first parallel computation of the
    process, or torch's workers keep what they have.
    """
    before = _flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes() -> bool:
    return bool(torch.tensor(1e-40) * 1.0 == 0.0)
