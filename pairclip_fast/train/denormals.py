"""Denormal numbers count as zero while a run trains on a CPU.

Below 1.2e-38 float32 keeps numbers with fewer and fewer digits, and processors hand arithmetic on them to microcode. Saturated
attention and GELU's tails fill a transformer with them: a run of `enhanced` in float32 slowed down from 55 to 20 pairs per second
until its third epoch, all of it in matrix products, and its checkpoint of that epoch trained on at 65 with denormals as zeros (two
cores with AVX-512). What is lost is far below the rounding errors of the sums that such numbers enter. GPUs' fast arithmetic does the same.
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
