"""What the bank operations take at best on some GPUs: an estimate from data sheets and operation counts, not a measurement.

The bound is the slower of two: all products at the tensor cores' dense peak, or every input and output moved once at the
memory's bandwidth (scores never leave the chip; that each bank tile is read once presumes that row blocks share it in the
second-level cache). Real kernels stay above it; by how much on these GPUs was not measured. Slices that
compute scores again and float32's three TF32 products are counted; what warps of one block repeat is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from pairclip_fast.gpus import Gpu
from pairclip_fast.kernels import tiles

Operation = Literal["bank_softmax", "bank_stats", "pair_scores", "bank_topk"]
SAMPLED = 1 / 8
"""Share of the bank that `bank_topk` computes a second time, for its threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Least time of one call, estimated."""

    flops: float
    bytes: float
    milliseconds: float
    limited_by: Literal["products", "memory"]


def bound(gpu: Gpu, operation: Operation, *, batch: int, captions: int, dim: int, dtype: torch.dtype, chosen: int = 1) -> Bound:
    """Least time of one call on `gpu`, which has TF32; `chosen` is P of `pair_scores`, k of `bank_topk`."""
    dim = tiles.width(dim)
    product = 2.0 * batch * captions * dim
    if operation == "bank_softmax":
        tile = tiles.softmax_tile(gpu.capability, dtype=dtype, dim=dim)
        slices = math.ceil(dim / tile.slice)
        products, out = product * slices + product * slices * tile.slice / dim, 4.0 * batch * (dim + 1)
    elif operation == "pair_scores":
        products, out = 2.0 * batch * chosen * dim, 4.0 * batch * chosen
    else:
        out = 12.0 * batch * chosen + 16.0 * batch
        products = product * (1 + SAMPLED if operation == "bank_topk" else 1)
    flops = products * (3 if tiles.precision_of(dtype) == "tf32x3" else 1)
    rows = batch + (batch * chosen if operation == "pair_scores" else captions)
    moved = rows * dim * dtype.itemsize + out
    peak = gpu.tf32_tflops if dtype == torch.float32 else gpu.tflops
    assert peak is not None, "our kernels need tensor cores with TF32"
    compute = flops / peak / 1e12
    memory = moved / gpu.bandwidth_gb_s / 1e9
    limited_by: Literal["products", "memory"] = "products" if compute >= memory else "memory"
    return Bound(flops=flops, bytes=moved, milliseconds=1e3 * max(compute, memory), limited_by=limited_by)


def softmax_workspace_bytes(gpu: Gpu, *, batch: int, captions: int, dim: int, dtype: torch.dtype) -> int:
    """Memory that `bank_softmax` takes beside its arguments, their wider copies and results; it stops growing with the bank."""
    dim = tiles.width(dim)
    tile = tiles.softmax_tile(gpu.capability, dtype=dtype, dim=dim)
    programs = math.ceil(batch / tile.rows) * math.ceil(dim / tile.slice)
    splits = tiles.split_bank(captions, columns=tile.columns, programs=programs, processors=gpu.processors)
    return 4 * tiles.tiles_per_split(captions, columns=tile.columns, splits=splits)[1] * batch * (dim + 2)
