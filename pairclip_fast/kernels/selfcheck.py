"""Whether an implementation of the bank operations computes what torch computes in float64, on a case with ties and groups.

One list of comparisons for everyone who asks: the first use of a kernel on a device, and `pairclip-fast doctor
--verify-kernels`. It holds the whole matrix of scores in float64, so the case should be small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pairclip_fast.kernels import portable
from pairclip_fast.kernels.choice import Kernels

SCALE = 20.0
TOP = 10
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference of log-partitions and means, with room for weights rounded to the inputs' dtype; far below what a wrong
kernel does."""
SCORE_TOLERANCE = 2e-6
"""The same for scores of normalised features, which are of float32's grade whatever the inputs are."""


class Comparison(NamedTuple):
    """One output of one operation."""

    operation: str
    output: str
    worst: float
    """Largest difference, or how many rows or places are wrong."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.allowed  # NaN is not


class Case(NamedTuple):
    """Arguments of the operations."""

    emb: Tensor
    bank: Tensor
    scale: Tensor
    targets: Tensor
    chosen: Tensor
    groups: Tensor


def make_case(*, device: torch.device, dtype: torch.dtype, batch: int, captions: int, dim: int) -> Case:
    """Random normalised features; the last captions repeat the first ones, so that scores tie; groups are pairs of neighbours."""
    generator = torch.Generator().manual_seed(0)
    emb, bank = (torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1) for rows in (batch, captions))
    repeated = captions // 5
    bank[captions - repeated :] = bank[:repeated]
    targets = (torch.arange(batch) * 7) % captions
    chosen = torch.stack([targets, (targets + 1) % captions], dim=1)
    groups = torch.arange(captions) // 2
    scale = torch.tensor(SCALE, device=device)
    return Case(emb.to(device, dtype), bank.to(device, dtype), scale, targets.to(device), chosen.to(device), groups.to(device))


def comparisons(kernels: Kernels, case: Case) -> Iterator[Comparison]:
    """Every output of every operation, one operation after the other; what an operation raises is raised."""
    emb, bank, scale = case.emb.double(), case.bank.double(), case.scale.double()
    scores, loss_tolerance, k = emb @ bank.T, LOSS_TOLERANCE[case.emb.dtype], min(TOP, len(bank))

    lse, mean = kernels.bank_softmax(case.emb, case.bank, case.scale)
    want_lse, want_mean = portable.bank_softmax(emb, bank, scale)
    yield Comparison("bank_softmax", "log-partition", _worst(lse, want_lse), loss_tolerance)
    yield Comparison("bank_softmax", "mean", _worst(mean, want_mean), loss_tolerance)

    for name, groups in (("", None), (" with groups", case.groups)):
        lse, best, greater, equal = kernels.bank_stats(case.emb, case.bank, case.scale, case.targets, groups)
        want = portable.bank_stats(emb, bank, scale, case.targets, groups)
        yield Comparison("bank_stats", f"log-partition{name}", _worst(lse, want[0]), loss_tolerance)
        yield Comparison("bank_stats", f"positive{name}", _worst(best, want[1]), SCORE_TOLERANCE)
        # Captions within a rounding of the positive may change sides; columns lost or counted twice may not.
        near = ((scores - want[1][:, None]).abs() <= SCORE_TOLERANCE).sum(dim=1)
        wrong = ((greater - want[2]).abs() > near) | ((greater + equal - want[2] - want[3]).abs() > near)
        yield Comparison("bank_stats", f"counts{name}", float(wrong.sum()), 0.0)

    pairs = kernels.pair_scores(case.emb, case.bank, case.chosen)
    yield Comparison("pair_scores", "scores", _worst(pairs, scores.gather(1, case.chosen)), SCORE_TOLERANCE)

    best, places = kernels.bank_topk(case.emb, case.bank, k)
    yield Comparison("bank_topk", "scores", _worst(best, scores.topk(k, dim=1).values), SCORE_TOLERANCE)
    yield Comparison("bank_topk", "indices", _worst(best, scores.gather(1, places)), SCORE_TOLERANCE)
    order = (best[:, 1:] < best[:, :-1]) | ((best[:, 1:] == best[:, :-1]) & (places[:, 1:] > places[:, :-1]))
    yield Comparison("bank_topk", "order", float((~order).sum()), 0.0)


def _worst(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())
