"""Which tile each Triton kernel runs with: a fixed table, no measuring at run time.

Autotuning would need the GPU that nobody here has, start every new shape with a slow step, and run tiles that no test has
seen. Each entry was chosen for what can be read from compiled code without a GPU (`benchmarks/kernel_matrix.py`): no spills,
within the shared memory, and no tensor-core instruction issued twice because warps outnumber rows. Architectures that are not
in the matrix get the tiles of a relative with tensor memory or of the smallest one in it. Everything before compute capability
8.0 has torch: Triton emits no tensor-core instruction there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

OLDEST_CAPABILITY = (8, 0)
SHARED_MEMORY_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
"""Compute capabilities in the matrix, and what one block may use there. Source: CUDA C programming guide, table of technical
specifications, "maximum amount of shared memory per thread block"."""
STEP_OF_DIM = 64
"""Features come in multiples of this, the largest depth of a step: others would be multiplied in shallow steps, or not at all."""
BLOCKS_PER_PROCESSOR = 2
LEAST_TILES_PER_SPLIT = 8
"""Below this, starting a program and combining its result weigh more than the parallelism brings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One block of scores and how it is computed."""

    rows: int
    columns: int
    depth: int
    """Features multiplied per step."""
    warps: int
    stages: int
    """Steps whose loads are in flight at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxTile(Tile):
    """A tile whose program also accumulates a slice of the mean caption."""

    slice: int
    """Features accumulated per program, a power of two; as many programs as it takes to cover all of them."""


def precision_of(dtype: torch.dtype) -> str:
    """How operands are multiplied. float32: three TF32 products, of float32's grade.

    One TF32 product would rank by 10 bits, and not only there: Triton hands the tensor cores unrounded numbers, of which they
    drop the low bits, so log-partitions came out too small beside targets that are not made of products (estimated: a loss of
    -0.03 where it is 0, at a scale of 50).
    """
    return "tf32x3" if dtype == torch.float32 else "ieee"


def width(dim: int) -> int:
    """The number of features that `dim` of them are computed with."""
    return math.ceil(dim / STEP_OF_DIM) * STEP_OF_DIM


def softmax_tile(capability: tuple[int, int], *, dtype: torch.dtype, dim: int) -> SoftmaxTile:
    """Tile of `bank_softmax`."""
    if dtype == torch.float32:
        # Four warps of 16 rows: eight would compute each score twice.
        return SoftmaxTile(rows=64, columns=16, depth=32, warps=4, stages=2, slice=_slice(dim, 128))
    if capability in ((8, 0), (9, 0)) and dim in (256, 512):  # the rows fit whole beside two blocks of captions
        return SoftmaxTile(rows=64, columns=64, depth=dim, warps=8, stages=2, slice=dim)
    columns = 64 if capability[0] == 10 else 32
    return SoftmaxTile(rows=64, columns=columns, depth=64, warps=8, stages=2, slice=_slice(dim, 512))


def stats_tile(capability: tuple[int, int], *, dtype: torch.dtype) -> Tile:
    """Tile of the counting pass of `bank_stats`."""
    if dtype == torch.float32:
        return Tile(rows=128, columns=64, depth=32, warps=8, stages=3)
    narrow = capability[0] == 10 or (capability, dtype) == ((9, 0), torch.float16)  # twice the columns spill
    columns = 64 if narrow else 128
    return Tile(rows=128, columns=columns, depth=64, warps=8, stages=3)


def topk_tile(*, dtype: torch.dtype) -> Tile:
    """Tile of the passes of `bank_topk`: small, since the position of each candidate in its list takes registers too."""
    if dtype == torch.float32:
        return Tile(rows=64, columns=32, depth=32, warps=4, stages=3)
    return Tile(rows=64, columns=64, depth=64, warps=8, stages=3)


def pair_tile(*, dtype: torch.dtype) -> Tile:
    """Tile of `pair_scores`; with three stages two of its cells spill."""
    return Tile(rows=64, columns=64, depth=32 if dtype == torch.float32 else 64, warps=4, stages=2)


def split_bank(captions: int, *, columns: int, programs: int, processors: int) -> int:
    """How many parts the bank is worked on in, so that `programs` per part keep all multiprocessors busy."""
    wanted = math.ceil(BLOCKS_PER_PROCESSOR * processors / max(1, programs))
    return max(1, min(wanted, math.ceil(captions / columns) // LEAST_TILES_PER_SPLIT))


def tiles_per_split(captions: int, *, columns: int, splits: int) -> tuple[int, int]:
    """Tiles in each part, and the number of parts that are then not empty (at most `splits`)."""
    tiles = math.ceil(captions / columns)
    each = math.ceil(tiles / splits)
    return each, math.ceil(tiles / each)


def _slice(dim: int, most: int) -> int:
    return min(most, 1 << (dim - 1).bit_length())
