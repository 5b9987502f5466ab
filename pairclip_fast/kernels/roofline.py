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

from pairclip_fast.kernels import tiles

Operation = Literal["bank_softmax", "bank_stats", "pair_scores", "bank_topk"]
SAMPLED = 1 / 8
"""Share of the bank that `bank_topk` computes a second time, for its threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Figures of a data sheet: dense, no sparsity, products accumulated in float32."""

    name: str
    capability: tuple[int, int]
    tflops: float
    """bfloat16 and float16."""
    tf32_tflops: float
    terabytes_per_s: float
    processors: int


GPUS = (
    Gpu(name="A100", capability=(8, 0), tflops=312, tf32_tflops=156, terabytes_per_s=2.04, processors=108),
    Gpu(name="RTX 3090", capability=(8, 6), tflops=71, tf32_tflops=35.6, terabytes_per_s=0.936, processors=82),
    Gpu(name="RTX 4090", capability=(8, 9), tflops=165, tf32_tflops=82.6, terabytes_per_s=1.01, processors=128),
    Gpu(name="L4", capability=(8, 9), tflops=121, tf32_tflops=60.5, terabytes_per_s=0.30, processors=58),
    Gpu(name="H100", capability=(9, 0), tflops=989, tf32_tflops=494, terabytes_per_s=3.35, processors=132),
    Gpu(name="H200", capability=(9, 0), tflops=989, tf32_tflops=494, terabytes_per_s=4.8, processors=132),
)
"""Source: NVIDIA's data sheets and architecture papers; the A100, H100 and H200 are the SXM ones with 80 GB and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Least time of one call, estimated."""

    flops: float
    bytes: float
    milliseconds: float
    limited_by: Literal["products", "memory"]


def find_gpu(name: str) -> Gpu | None:
    """The data sheet for a device name as torch gives it; None if there is none."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in GPUS if all(word in words for word in gpu.name.split())), None)


def bound(gpu: Gpu, operation: Operation, *, batch: int, captions: int, dim: int, dtype: torch.dtype, chosen: int = 1) -> Bound:
    """Least time of one call on `gpu`; `chosen` is P of `pair_scores`, k of `bank_topk`."""
    product = 2.0 * batch * captions * dim
    if operation == "bank_softmax":
        precision = tiles.softmax_precision(dtype)
        tile = tiles.softmax_tile(gpu.capability, dtype=dtype, dim=dim, precision=precision)
        slices = math.ceil(dim / tile.slice)
        products, out = product * slices + product * slices * tile.slice / dim, 4.0 * batch * (dim + 1)
    elif operation == "pair_scores":
        precision, products, out = tiles.exact_precision(dtype), 2.0 * batch * chosen * dim, 4.0 * batch * chosen
    else:
        precision, out = tiles.exact_precision(dtype), 12.0 * batch * chosen + 16.0 * batch
        products = product * (1 + SAMPLED if operation == "bank_topk" else 1)
    flops = products * (3 if precision == "tf32x3" else 1)
    rows = batch + (batch * chosen if operation == "pair_scores" else captions)
    moved = rows * dim * dtype.itemsize + out
    compute = flops / (gpu.tf32_tflops if dtype == torch.float32 else gpu.tflops) / 1e12
    memory = moved / gpu.terabytes_per_s / 1e12
    limited_by: Literal["products", "memory"] = "products" if compute >= memory else "memory"
    return Bound(flops=flops, bytes=moved, milliseconds=1e3 * max(compute, memory), limited_by=limited_by)


def softmax_workspace_bytes(gpu: Gpu, *, batch: int, captions: int, dim: int, dtype: torch.dtype) -> int:
    """Memory that `bank_softmax` takes beside its arguments and results; it stops growing with the bank."""
    tile = tiles.softmax_tile(gpu.capability, dtype=dtype, dim=dim, precision=tiles.softmax_precision(dtype))
    programs = math.ceil(batch / tile.rows) * math.ceil(dim / tile.slice)
    splits = tiles.split_bank(captions, columns=tile.columns, programs=programs, processors=gpu.processors)
    return 4 * tiles.tiles_per_split(captions, columns=tile.columns, splits=splits)[1] * batch * (dim + 2)
