"""`bank_stats` in Triton: log-partition and ranks in one pass over the bank, without keeping a score.

A rank is a count of captions that score above the best positive, so that score has to be known before the pass, to the bit:
one unit in the last place off, and a caption equal to the positive counts as better. The score of the target itself,
computed beforehand, is only a guess (other members of its group may score higher, and no compiler promises equal bits in two
kernels). So the pass also finds the best positive on its way; a second pass, whose programs end at once unless a row of theirs
was guessed wrong, then counts against the score that the first one saw with the very same instructions. The answer is exact
whatever the guess was; a good guess makes it one pass.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairclip_fast.kernels.tiles import Tile, precision_of, tiles_per_split
from pairclip_fast.kernels.triton_scores import pair_scores, score_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["batch", "captions", "tiles_per_split"])
@no_type_check
def stats_kernel(
    emb, emb_stride, bank, bank_stride, scale, positive, counted, own, groups,
    lse_out, best_out, greater_out, equal_out, batch, captions, tiles_per_split,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per split: log-partition, best positive seen, and the non-positives above and equal to `positive`.

    `counted` is what an earlier pass counted against: rows where it is the same, or NaN, are settled.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    present = row < batch
    source = tl.minimum(row, batch - 1)
    target = tl.load(positive + source)
    before = tl.load(counted + source)
    if tl.max(((target != before) & (before == before)).to(tl.int32), 0) == 0:
        return
    owner = tl.load(own + source)
    scale2 = tl.load(scale).to(tl.float32) * LOG2E
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    greater = tl.zeros((ROWS,), tl.int32)
    equal = tl.zeros((ROWS,), tl.int32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(captions, COLUMNS))
    for tile in tl.range(first, last, flatten=True):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.minimum(column, captions - 1)
        scores = score_tile(emb, emb_stride, source, bank, bank_stride, place, DIM, DEPTH, PRECISION)
        inside = (column < captions)[None, :]
        group = tl.load(groups + place) if groups is not None else place
        mine = group[None, :] == owner[:, None]
        best = tl.maximum(best, tl.max(tl.where(mine, scores, float("-inf")), 1))  # past the end: the last caption once more
        rival = inside & ~mine
        greater += tl.sum(((scores > target[:, None]) & rival).to(tl.int32), 1)
        equal += tl.sum(((scores == target[:, None]) & rival).to(tl.int32), 1)
        logits = tl.where(inside, scores * scale2, float("-inf"))
        higher = tl.maximum(high, tl.max(logits, 1))
        total = total * tl.exp2(high - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        high = higher
    out = split.to(tl.int64) * batch + row
    tl.store(lse_out + out, (high + tl.log2(total)) * LN2, mask=present)
    tl.store(best_out + out, best, mask=present)
    tl.store(greater_out + out, greater, mask=present)
    tl.store(equal_out + out, equal, mask=present)


def bank_stats(
    emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None, *, tile: Tile, pair_tile: Tile, splits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-partition, best positive score, captions above it and captions equal to it, each [B]."""
    captions = bank.shape[0]
    if emb.shape[0] == 0:
        none = emb.new_empty(0, dtype=torch.float32)
        return none, none.clone(), none.int(), none.int()
    labels = None if groups is None else group_labels(groups)
    own = targets.int() if labels is None else labels[targets]
    guess = pair_scores(emb, bank, targets[:, None], tile=pair_tile)[:, 0].contiguous()
    tiles, splits = tiles_per_split(captions, columns=tile.columns, splits=splits)
    part_lse, part_best = (torch.empty(splits, emb.shape[0], dtype=torch.float32, device=emb.device) for _ in range(2))
    part_greater, part_equal = (torch.empty(splits, emb.shape[0], dtype=torch.int32, device=emb.device) for _ in range(2))

    def count(positive: Tensor, counted: Tensor) -> None:
        stats_kernel[(triton.cdiv(emb.shape[0], tile.rows), splits)](
            emb, emb.stride(0), bank, bank.stride(0), scale.float(), positive, counted, own, labels,
            part_lse, part_best, part_greater, part_equal, emb.shape[0], captions, tiles,
            DIM=emb.shape[1], ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision_of(emb.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    count(guess, torch.where(guess == torch.inf, 0.0, torch.inf))  # nothing is settled yet
    positive = torch.where(guess.isnan(), guess, part_best.amax(dim=0))
    count(positive, guess)
    lse = torch.logsumexp(part_lse, dim=0)
    greater, equal = (part.sum(dim=0, dtype=torch.int32) for part in (part_greater, part_equal))
    damaged = lse.isnan() | positive.isnan()  # also of a target that does not exist
    return lse, positive, torch.where(damaged, captions, greater), torch.where(damaged, 0, equal)


def group_labels(groups: Tensor) -> Tensor:
    """Any numbers to numbers that fit 32 bits: the place of each group's first member in sorted order."""
    return torch.searchsorted(groups.sort().values, groups).int()
