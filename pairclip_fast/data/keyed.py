"""Counter-based random numbers: each value is a pure function of (seed, stream, position).

The order of images, the pairing and the generated shapes must come out the same on every machine and with every numpy
for years, which numpy's own generators do not promise across versions. SplitMix64 is ten lines of integer arithmetic,
so there is nothing to drift; only IEEE-exact operations (+ - * / and comparisons) follow it.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), and Stafford's mix 13.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MANTISSA_BITS = 53


def stream_key(seed: int, stream: str) -> int:
    """A 64-bit key for one named stream of one seed; different names give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def random_bits(count: int, *, seed: int, stream: str) -> npt.NDArray[np.uint64]:
    """`count` uniform 64-bit words."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(stream_key(seed, stream))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def random_uniform(count: int, *, seed: int, stream: str) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1), each a multiple of 2^-53."""
    bits = random_bits(count, seed=seed, stream=stream) >> np.uint64(64 - MANTISSA_BITS)
    return bits.astype(np.float64) * 2.0**-MANTISSA_BITS


def permutation(count: int, *, seed: int, stream: str) -> npt.NDArray[np.int64]:
    """A uniformly random order of 0..count-1: the order of `count` random words (a tie, 1 in 2^64 per pair, keeps its order)."""
    return np.argsort(random_bits(count, seed=seed, stream=stream), kind="stable").astype(np.int64)
