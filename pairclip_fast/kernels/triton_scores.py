"""One tile of scores in Triton, and the two kernels that hand such tiles out: chosen pairs, and whole rows.

`score_tile` is the only place where embeddings meet captions to be ranked. Every kernel that compares scores with each other
calls it with the same depth of a step, so equal captions get equal bits wherever in a tile they lie, and a tie stays a tie.
Rows and columns past the end read the last valid one instead of being masked: the loads need no predicate, and whoever uses
the tile drops what is not there. float32 operands are multiplied as three TF32 products ("tf32x3"): products of float32's
grade on tensor cores, where plain TF32 would rank by 10 bits of mantissa.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairclip_fast.kernels.tiles import Tile, precision_of


@triton.jit
@no_type_check  # the tests' annotation hook would wrap the function that Triton wants to read
def score_tile(
    emb, emb_stride, rows, bank, bank_stride, columns, DIM: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Dot products of embeddings `rows` with captions `columns`, float32; offsets in 64 bits, since N * D may pass 2**31."""
    depth = tl.arange(0, DEPTH)
    left = emb + rows[:, None].to(tl.int64) * emb_stride + depth[None, :]
    right = bank + columns[None, :].to(tl.int64) * bank_stride + depth[:, None]
    scores = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in tl.range(0, DIM, DEPTH):
        scores = tl.dot(tl.load(left + start), tl.load(right + start), scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["batch", "captions", "chosen"])
@no_type_check
def pair_kernel(
    emb, emb_stride, bank, bank_stride, indices, out, batch, captions, chosen,
    DIM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The diagonal of a tile whose columns are the captions chosen for its rows: the tile's arithmetic, one use of each product.

    A caption that does not exist scores NaN: nobody checks indices on a GPU, and reading past the bank ends its process.
    """
    row = tl.program_id(0) // chosen * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64) * chosen + tl.program_id(0) % chosen
    index = tl.load(indices + place, mask=row < batch, other=-1)
    column = tl.minimum(tl.maximum(index, 0), captions - 1)
    scores = score_tile(emb, emb_stride, tl.minimum(row, batch - 1), bank, bank_stride, column, DIM, DEPTH, PRECISION)
    diagonal = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    score = tl.where(index < captions, score, float("nan"))
    tl.store(out + place, tl.where(index >= 0, score, float("-inf")), mask=row < batch)


@triton.jit(do_not_specialize=["batch", "captions", "step", "width"])
@no_type_check
def row_kernel(
    emb, emb_stride, bank, bank_stride, out, batch, captions, step, width,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores with every `step`-th caption, [batch, width]."""
    tiles = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.minimum(place * step, captions - 1)
    scores = score_tile(emb, emb_stride, tl.minimum(row, batch - 1), bank, bank_stride, column, DIM, DEPTH, PRECISION)
    inside = (row < batch)[:, None] & (place < width)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * width + place[None, :], scores, mask=inside)


def pair_scores(emb: Tensor, bank: Tensor, indices: Tensor, *, tile: Tile) -> Tensor:
    """Dot products of each row with the captions chosen for it, [B, P]; -1 gives -inf."""
    out = torch.empty(indices.shape, dtype=torch.float32, device=emb.device)
    if out.numel() == 0:
        return out
    programs = triton.cdiv(emb.shape[0], tile.rows) * indices.shape[1]  # in one dimension: the others end at 65,535
    pair_kernel[(programs,)](
        emb, emb.stride(0), bank, bank.stride(0), indices.contiguous(), out, emb.shape[0], bank.shape[0], indices.shape[1],
        DIM=emb.shape[1], ROWS=tile.rows, DEPTH=tile.depth, PRECISION=precision_of(emb.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def row_scores(emb: Tensor, bank: Tensor, *, step: int, tile: Tile) -> Tensor:
    """Scores of each row with captions 0, step, 2 * step, ...: [B, ceil(N / step)]."""
    width = triton.cdiv(bank.shape[0], step)
    out = torch.empty(emb.shape[0], width, dtype=torch.float32, device=emb.device)
    programs = triton.cdiv(emb.shape[0], tile.rows) * triton.cdiv(width, tile.columns)
    row_kernel[(programs,)](
        emb, emb.stride(0), bank, bank.stride(0), out, emb.shape[0], bank.shape[0], step, width,
        DIM=emb.shape[1], ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision_of(emb.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
