"""Philox4x32-10: random numbers as a pure function of (key, counter), vectorised over counters.

Every random decision of the loader is one block of this function, addressed by what it is for. Nothing has to be drawn
"in order", so any backend, rank or resumed run computes the same numbers. It is a handful of 32-bit multiplications, which
C++ and Triton (`tl.randint4x`) have word for word; numpy's own `Philox` is the 4x64 variant and gives other numbers.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the Random123 library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], *, key: tuple[int, int]) -> NDArray[np.uint32]:
    """The Philox4x32-10 block of each counter.

    Args:
        counter: uint32 [..., 4].
        key: Two 32-bit words.

    Returns:
        uint32 [..., 4], uniform over all 32-bit words.
    """
    if counter.ndim == 0 or counter.shape[-1] != 4:
        raise ValueError(f"a Philox4x32 counter has 4 words, got shape {counter.shape}")
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        # uint64 holds the whole product of two 32-bit words: the high half and the low half are both used.
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0), p1 & _WORD, (p0 >> _HALF) ^ c3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def seed_key(seed: int) -> tuple[int, int]:
    """The low and high 32-bit word of a seed in 0..2**64-1."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def unit_interval(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The upper 24 bits of each word as a number in [0, 1): exact in float32 too, so every backend has the same one."""
    return (words >> np.uint32(8)).astype(np.float64) * 2.0**-24


def bounded(words: NDArray[np.uint32], *, count: int) -> NDArray[np.int64]:
    """Each word as an integer in 0..count-1 (multiply-shift; the bias is below count / 2**32)."""
    return ((words.astype(np.uint64) * np.uint64(count)) >> _HALF).astype(np.int64)
