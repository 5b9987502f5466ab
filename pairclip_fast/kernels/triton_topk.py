"""`bank_topk` in Triton: exact and stable, in memory that does not grow with the bank.

Sorting inside every tile would cost several times the tile's products. Instead: the k-th best score of a sample (every
`step`-th caption) is a lower bound for the k-th best of all, so one pass over the bank appends the captions that reach it to
a short list per row and split, in the order of the bank; a stable sort of about `step * k` candidates then gives score
descending, index ascending. What is left to luck is checked per row: a list that overflowed (banks whose neighbours resemble each
other, NaN) or came out too short sends its row to the plain way, all scores and a stable sort. Where the list is whole, the
answer is exact whatever the threshold was, so the sample needs no margin for rounding.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairclip_fast.kernels.tiles import Tile, precision_of, split_bank, tiles_per_split
from pairclip_fast.kernels.triton_scores import row_scores, score_tile

WORKSPACE_BYTES = 256 * 2**20
"""Of lists and samples at a time: enough to fill a large GPU with programs for the ten best of 10,000."""
SORT_BYTES = 24
"""Memory of one score that is sorted: itself, its place, the sorted copies of both, and as much again for the sort."""
SMALL_BANK = 4096
"""Up to here whole rows are sorted: the lists would not be shorter."""
STEP, LARGEST_SAMPLE = 8, 65_536
"""One caption in eight is sampled, but never more than this many: the sample's scores are the largest thing in memory."""
MOST_LISTED = 0.5
"""All lists of a row together have no more places than this share of its scores: they are to be sorted instead of these."""
SLACK = 256
"""Places in a list beyond twice the expected candidates; for k = 1 their number has a long tail."""


@triton.jit(do_not_specialize=["batch", "captions", "tiles_per_split", "capacity"])
@no_type_check  # the tests' annotation hook would wrap the function that Triton wants to read
def filter_kernel(
    emb, emb_stride, bank, bank_stride, threshold, counts, out_scores, out_indices, batch, captions, tiles_per_split, capacity,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Append captions that reach the row's threshold to the list of (row, split); count them even when the list is full.

    The place of a candidate is the count so far plus its rank within the tile (a prefix sum): no atomics, always the same order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    source = tl.minimum(row, batch - 1)
    least = tl.load(threshold + source)
    found = tl.zeros((ROWS,), tl.int32)
    place = row.to(tl.int64) * tl.num_programs(1) + split
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(captions, COLUMNS))
    for tile in tl.range(first, last, flatten=True):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        scores = score_tile(emb, emb_stride, source, bank, bank_stride, tl.minimum(column, captions - 1), DIM, DEPTH, PRECISION)
        hit = ~(scores < least[:, None]) & (column < captions)[None, :] & (row < batch)[:, None]  # NaN too: it sorts first
        one = hit.to(tl.int32)
        position = found[:, None] + tl.cumsum(one, 1) - one
        found += tl.sum(one, 1)
        target = place[:, None] * capacity + position
        fits = hit & (position < capacity)
        tl.store(out_scores + target, scores, mask=fits)
        tl.store(out_indices + target, tl.broadcast_to(column[None, :], (ROWS, COLUMNS)), mask=fits)
    tl.store(counts + place, found, mask=row < batch)


def bank_topk(emb: Tensor, bank: Tensor, k: int, *, tile: Tile, processors: int) -> tuple[Tensor, Tensor]:
    """Scores [B, k] and indices [B, k] of the best captions. Waits for the device once, to learn which rows need the plain way."""
    batch, captions = emb.shape[0], bank.shape[0]
    if captions <= max(SMALL_BANK, 2 * STEP * k):
        return sorted_rows(emb, bank, k, tile=tile)
    step = max(STEP, triton.cdiv(captions, LARGEST_SAMPLE))
    capacity = 2 * step * k + SLACK
    rows, splits = blocks_of_rows(batch, captions, step=step, capacity=capacity, tile=tile, processors=processors)
    scores = torch.empty(batch, k, dtype=torch.float32, device=emb.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=emb.device)
    whole = torch.empty(batch, dtype=torch.bool, device=emb.device)
    for start in range(0, batch, rows):
        block = slice(start, start + rows)
        threshold = row_scores(emb[block], bank, step=step, tile=tile).topk(k, dim=1).values[:, -1].contiguous()
        found, places, counts = candidates(emb[block], bank, threshold, capacity=capacity, splits=splits, tile=tile)
        best, order = found.sort(dim=1, descending=True, stable=True)
        scores[block], indices[block] = best[:, :k], places.gather(1, order[:, :k])
        whole[block] = (counts <= capacity).all(dim=1) & (counts.sum(dim=1) >= k)
    lacking = (~whole).nonzero()[:, 0]
    if len(lacking):
        scores[lacking], indices[lacking] = sorted_rows(emb[lacking], bank, k, tile=tile)
    return scores, indices


def blocks_of_rows(batch: int, captions: int, *, step: int, capacity: int, tile: Tile, processors: int) -> tuple[int, int]:
    """Rows at a time, and parts of the bank, whose lists fit the workspace; a single tile of rows and one part always may."""
    list_bytes, sample_bytes = SORT_BYTES * capacity * tile.rows, 4 * triton.cdiv(captions, step) * tile.rows
    rows = max(1, WORKSPACE_BYTES // (list_bytes + sample_bytes))
    programs = max(1, min(rows, triton.cdiv(batch, tile.rows)))
    wanted = split_bank(captions, columns=tile.columns, programs=programs, processors=processors)
    fitting = (WORKSPACE_BYTES // programs - sample_bytes) // list_bytes
    return programs * tile.rows, max(1, min(wanted, fitting, int(MOST_LISTED * captions) // capacity))


def candidates(emb: Tensor, bank: Tensor, threshold: Tensor, *, capacity: int, splits: int, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Captions that reach the threshold, in index order: scores and indices [B, splits * capacity] (-inf where empty), counts."""
    batch = emb.shape[0]
    tiles, splits = tiles_per_split(bank.shape[0], columns=tile.columns, splits=splits)
    scores = torch.full((batch, splits * capacity), -torch.inf, device=emb.device)
    indices = torch.zeros(batch, splits * capacity, dtype=torch.int32, device=emb.device)
    counts = torch.empty(batch, splits, dtype=torch.int32, device=emb.device)
    filter_kernel[(triton.cdiv(batch, tile.rows), splits)](
        emb, emb.stride(0), bank, bank.stride(0), threshold, counts, scores, indices, batch, bank.shape[0], tiles, capacity,
        DIM=emb.shape[1], ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision_of(emb.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return scores, indices, counts


def sorted_rows(emb: Tensor, bank: Tensor, k: int, *, tile: Tile) -> tuple[Tensor, Tensor]:
    """The plain way: all scores of some rows, sorted."""
    rows = max(1, WORKSPACE_BYTES // (SORT_BYTES * bank.shape[0]))
    scores = torch.empty(emb.shape[0], k, dtype=torch.float32, device=emb.device)
    indices = torch.empty(emb.shape[0], k, dtype=torch.int64, device=emb.device)
    for start in range(0, emb.shape[0], rows):
        block = slice(start, start + rows)
        best, order = row_scores(emb[block], bank, step=1, tile=tile).sort(dim=1, descending=True, stable=True)
        scores[block], indices[block] = best[:, :k], order[:, :k]
    return scores, indices
