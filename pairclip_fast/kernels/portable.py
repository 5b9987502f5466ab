"""The four bank kernels in torch alone, blocked so that the [B, N] scores never exist as a whole.

This is what runs where no kernel of our own covers the device or the shape. One block is at most `ROWS` rows by as many
captions as fit in `WORKSPACE_BYTES`; its buffer is used again for every block, which on a CPU also avoids page faults (they
cost more than the arithmetic of a softmax). bfloat16 and float16 inputs are computed in float32: scores rounded to 8 bits
of mantissa tie by the hundred, and ranks made from them are worthless.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20
ROWS = 256
"""Rows of a block: past about this many, larger matrix products are no faster on the CPUs measured."""


def bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Online softmax over blocks of captions (Milakov and Gimelshein 2018; Rabe and Staats 2021)."""
    emb, bank = _wide(emb), _wide(bank)
    lse, mean = emb.new_empty(emb.shape[0]), emb.new_empty(emb.shape)
    columns = _columns(emb, bank)
    buffer = emb.new_empty(min(ROWS, emb.shape[0]) * columns)
    for start in range(0, emb.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        query, out = emb[rows] * scale, mean[rows].zero_()
        high, total = query.new_full((len(query), 1), -torch.inf), query.new_zeros(len(query), 1)
        for first in range(0, bank.shape[0], columns):
            block = bank[first : first + columns]
            scores = torch.mm(query, block.T, out=buffer[: len(query) * len(block)].view(len(query), len(block)))
            high, previous = torch.maximum(high, scores.amax(dim=1, keepdim=True)), high
            shrink = (previous - high).exp_()
            total = total * shrink + scores.sub_(high).exp_().sum(dim=1, keepdim=True)
            out.mul_(shrink).addmm_(scores, block)
        out.div_(total)
        lse[rows] = torch.where(high == torch.inf, high, high + total.log()).squeeze(1)
    return lse, mean


def bank_stats(emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks by counting. The positives' score is read from the same product as the competitors', so equal captions tie exactly."""
    emb, bank = _wide(emb), _wide(bank)
    batch, captions = emb.shape[0], bank.shape[0]
    lse, best = emb.new_empty(batch), emb.new_empty(batch)
    greater, equal = (torch.empty(batch, dtype=torch.int32, device=emb.device) for _ in range(2))
    members = None if groups is None else _members(groups, targets)
    for rows, scores in _score_rows(emb, bank):
        index = targets[rows, None] if members is None else members[rows]
        present = index >= 0
        positives = scores.gather(1, index.clamp(min=0)).masked_fill_(~present, -torch.inf)
        top = positives.amax(dim=1, keepdim=True)
        # `top` is the best positive, so no positive is above it, and those equal to it are taken off again.
        above = (scores > top).sum(dim=1)
        ties = (scores == top).sum(dim=1) - (present & (positives == top)).sum(dim=1)
        lse[rows], best[rows] = torch.logsumexp(scores.mul_(scale), dim=1), top.squeeze(1)
        damaged = lse[rows].isnan()
        greater[rows] = torch.where(damaged, captions, above).int()
        equal[rows] = torch.where(damaged, 0, ties).int()
    return lse, best, greater, equal


def pair_scores(emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    """Gathered dot products, in blocks of rows whose gathered captions fit the workspace."""
    emb, bank = _wide(emb), _wide(bank)
    out = emb.new_empty(indices.shape)
    step = max(1, WORKSPACE_BYTES // (4 * max(1, indices.shape[1]) * emb.shape[1]))
    for start in range(0, emb.shape[0], step):
        rows = slice(start, start + step)
        chosen = bank[indices[rows].clamp(min=0)]
        out[rows] = torch.bmm(chosen, emb[rows, :, None]).squeeze(2)
    return out.masked_fill_(indices < 0, -torch.inf)


def bank_topk(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact and stable: `torch.topk` picks freely among equal scores, so rows it leaves in doubt are sorted whole."""
    emb, bank = _wide(emb), _wide(bank)
    values = emb.new_empty(emb.shape[0], k)
    indices = torch.empty(emb.shape[0], k, dtype=torch.int64, device=emb.device)
    for rows, scores in _score_rows(emb, bank):
        chosen = scores.topk(k, dim=1).indices.sort(dim=1).values
        found, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        chosen = chosen.gather(1, order)
        # Doubt: more captions reach the k-th best score than there are places (or NaN, which reaches nothing).
        doubt = ((scores >= found[:, -1:]).sum(dim=1) != k).nonzero().squeeze(1)
        for row in doubt.tolist():
            best, where = scores[row].sort(descending=True, stable=True)
            found[row], chosen[row] = best[:k], where[:k]
        values[rows], indices[rows] = found, chosen
    return values, indices


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _columns(emb: Tensor, bank: Tensor) -> int:
    fitting = WORKSPACE_BYTES // (emb.element_size() * max(1, min(ROWS, emb.shape[0])))
    return max(1, min(bank.shape[0], fitting))


def _score_rows(emb: Tensor, bank: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of whole score rows in one buffer that the next block overwrites."""
    captions = bank.shape[0]
    step = max(1, min(ROWS, WORKSPACE_BYTES // (emb.element_size() * captions)))
    buffer = emb.new_empty(min(step, emb.shape[0]) * captions)
    for start in range(0, emb.shape[0], step):
        block = emb[start : start + step]
        yield slice(start, start + step), torch.mm(block, bank.T, out=buffer[: len(block) * captions].view(len(block), captions))


def _members(groups: Tensor, targets: Tensor) -> Tensor:
    """Indices of the captions in each target's group, [B, largest group], filled up with -1."""
    order = torch.argsort(groups, stable=True)
    ordered, wanted = groups[order], groups[targets]
    first = torch.searchsorted(ordered, wanted)
    size = torch.searchsorted(ordered, wanted, right=True) - first
    offsets = torch.arange(int(size.max()) if size.numel() else 1, device=groups.device)
    places = (first[:, None] + offsets).clamp(max=len(order) - 1)
    return order[places].masked_fill(offsets >= size[:, None], -1)
