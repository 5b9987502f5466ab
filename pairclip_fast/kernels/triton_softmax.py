"""`bank_softmax` in Triton: attention whose keys and values are both the caption bank, in one pass over it.

A program owns a block of rows, one split of the bank and one slice of the features. It keeps the running maximum, the running
sum and the weighted sum of captions on chip (online softmax: Milakov and Gimelshein 2018; as in FlashAttention, Dao et al.
2022), so no score ever reaches memory. Up to 512 features one slice holds all of them: 4BND FLOPs. More features take several
slices, each of which computes the scores again, which is cheaper than a pass of its own for the log-partition.

Why splits: at 64 rows a block, even 4,096 rows are 64 programs for the 100 and more multiprocessors of a large GPU. Each
split leaves its own sums, and `combine_kernel` adds them in the order of the splits: no atomics, and the result is the same
bits every time. The price is a workspace of splits * B * (D + 2) floats, whatever N is.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairclip_fast.kernels.tiles import SoftmaxTile, precision_of, tiles_per_split
from pairclip_fast.kernels.triton_scores import score_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
COMBINE_ROWS, COMBINE_FEATURES, COMBINE_WARPS = 4, 256, 4
"""A combining program only streams: any block that keeps the memory busy will do."""


@triton.jit(do_not_specialize=["batch", "captions", "tiles_per_split"])
@no_type_check
def softmax_kernel(
    emb, emb_stride, bank, bank_stride, scale, high_out, total_out, mean_out, batch, captions, tiles_per_split,
    DIM: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per split: highest base-2 logit, sum of the weights relative to it (both [splits, batch]), weighted sum of the captions."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    feature = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    source = tl.minimum(row, batch - 1)
    whole: tl.constexpr = DEPTH == DIM and SLICE == DIM  # rows stay on chip, and a caption is loaded once for both products
    if whole:
        query = tl.load(emb + source[:, None].to(tl.int64) * emb_stride + feature[None, :])
    # Base-2 logarithms: exp2 is the instruction, exp is a multiplication more.
    scale2 = tl.load(scale).to(tl.float32) * LOG2E
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, SLICE), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(captions, COLUMNS))
    for tile in tl.range(first, last):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.minimum(column, captions - 1)
        values = bank + place[:, None].to(tl.int64) * bank_stride + feature[None, :]
        if whole:
            value = tl.load(values)
            scores = tl.dot(query, tl.trans(value), input_precision=PRECISION)
        else:
            scores = score_tile(emb, emb_stride, source, bank, bank_stride, place, DIM, DEPTH, PRECISION)
        # Masked before the maximum: a padded column that entered it as 0 would drown rows whose logits are all very negative.
        logits = tl.where((column < captions)[None, :], scores * scale2, float("-inf"))
        higher = tl.maximum(high, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None]
        if not whole:
            value = tl.load(values, mask=(feature < DIM)[None, :], other=0.0) if DIM % SLICE else tl.load(values)
        mean = tl.dot(weight.to(value.dtype), value, mean, input_precision=PRECISION)
        high = higher
    place = split.to(tl.int64) * batch + row
    present = row < batch
    if tl.program_id(2) == 0:  # every slice has the same two; one writes them
        tl.store(high_out + place, high, mask=present)
        tl.store(total_out + place, total, mask=present)
    inside = present[:, None] & (feature < DIM)[None, :]
    tl.store(mean_out + place[:, None] * DIM + feature[None, :], mean, mask=inside)


@triton.jit(do_not_specialize=["batch", "splits"])
@no_type_check
def combine_kernel(
    high, total, mean, lse_out, mean_out, batch, splits, DIM: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """Sums of the splits on the scale of the highest maximum, in the order of the splits, and normalised."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    present = row < batch
    inside = present[:, None] & (feature < DIM)[None, :]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        highest = tl.maximum(highest, tl.load(high + split * batch + row, mask=present, other=0.0))
    whole = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, FEATURES), tl.float32)
    for split in tl.range(0, splits):
        place = split * batch + row.to(tl.int64)
        share = tl.exp2(tl.load(high + place, mask=present, other=0.0) - highest)
        whole += share * tl.load(total + place, mask=present, other=1.0)
        weighted += share[:, None] * tl.load(mean + place[:, None] * DIM + feature[None, :], mask=inside, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(lse_out + row, (highest + tl.log2(whole)) * LN2, mask=present)
    tl.store(mean_out + row[:, None].to(tl.int64) * DIM + feature[None, :], weighted / whole[:, None], mask=inside)


def bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor, *, tile: SoftmaxTile, splits: int) -> tuple[Tensor, Tensor]:
    """Log-partition [B] and mean caption [B, D] of the softmax over the bank."""
    (batch, dim), captions = emb.shape, bank.shape[0]
    tiles, splits = tiles_per_split(captions, columns=tile.columns, splits=splits)
    lse, mean, high, total, sums = (
        torch.empty(shape, dtype=torch.float32, device=emb.device)
        for shape in ((batch,), (batch, dim), (splits, batch), (splits, batch), (splits, batch, dim))
    )
    if batch == 0:
        return lse, mean
    softmax_kernel[(triton.cdiv(batch, tile.rows), splits, triton.cdiv(dim, tile.slice))](
        emb, emb.stride(0), bank, bank.stride(0), scale.float(), high, total, sums, batch, captions, tiles,
        DIM=dim, SLICE=tile.slice, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision_of(emb.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(batch, COMBINE_ROWS), triton.cdiv(dim, COMBINE_FEATURES))](
        high, total, sums, lse, mean, batch, splits, DIM=dim, ROWS=COMBINE_ROWS, FEATURES=COMBINE_FEATURES, num_warps=COMBINE_WARPS
    )
    return lse, mean
