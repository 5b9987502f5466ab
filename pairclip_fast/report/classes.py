"""Per-class errors: which classes are found on each side, and which are taken for which."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pairclip_fast.report.data import Evaluation
from pairclip_fast.report.words import shown

EXTREMES = 8
"""Classes listed at each end of a side."""
CONFUSIONS = 10
STRIP_LIMIT = 600
"""Beyond this a strip of cells is thinner than a pixel and says nothing."""


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """One class on one side: found in `share` of the `total` pairs that show it there."""

    name: str
    share: float
    total: int


@dataclasses.dataclass(frozen=True)
class SideResult:
    """One side. `strip` is in class order, `worst` and `best` by share."""

    side: str
    mean: float
    strip: list[ClassResult]
    worst: list[ClassResult]
    best: list[ClassResult]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """`true` was called `called` `count` times, counting both sides; `share` is of the pairs that show `true`."""

    true: str
    called: str
    count: int
    share: float


def class_name(names: list[str], index: int) -> str:
    """The display name of class `index`, or its number where the manifest does not have it."""
    return shown(names[index], limit=60) if 0 <= index < len(names) else f"class {index}"


def side_results(evaluation: Evaluation, names: list[str]) -> list[SideResult]:
    """Left and right, those that the evaluation recorded; classes without a pair on that side are left out."""
    sides = []
    for side in ("left", "right"):
        correct, total = (evaluation.arrays.get(f"per_class_{side}_{what}") for what in ("correct", "total"))
        if correct is None or total is None or not np.any(total > 0):
            continue
        results = [
            ClassResult(class_name(names, index), min(1.0, max(0.0, int(good) / int(count))), int(count))
            for index, (good, count) in enumerate(zip(correct, total, strict=True))
            if count > 0
        ]
        ordered = sorted(results, key=lambda result: (result.share, result.name))
        shown_each = min(EXTREMES, len(ordered) // 2) or len(ordered)
        mean = math.fsum(result.share for result in results) / len(results)
        strip = results if len(results) <= STRIP_LIMIT else []
        sides.append(SideResult(side, mean, strip, ordered[:shown_each], ordered[::-1][:shown_each]))
    return sides


def confusions(evaluation: Evaluation, names: list[str]) -> list[Confusion]:
    """The most frequent mistakes of the best caption, both sides together, most frequent first."""
    top_ids, truth = evaluation.arrays.get("top_ids"), evaluation.arrays.get("caption_ids")
    count = len(names)
    if top_ids is None or truth is None or not len(truth) or not top_ids.shape[1] or not count:
        return []
    called, true = top_ids[:, 0].astype(np.int64), truth.astype(np.int64)
    usable = (called >= 0) & (called < count**2) & (true >= 0) & (true < count**2)
    called, true = called[usable], true[usable]
    pairs = np.concatenate([true // count * count + called // count, true % count * count + called % count])
    appearances = np.bincount(np.concatenate([true // count, true % count]), minlength=count)
    kinds, counts = np.unique(pairs[pairs // count != pairs % count], return_counts=True)
    order = np.lexsort((kinds, -counts))[:CONFUSIONS]
    return [
        Confusion(
            class_name(names, int(kinds[i] // count)),
            class_name(names, int(kinds[i] % count)),
            int(counts[i]),
            float(counts[i] / appearances[kinds[i] // count]),
        )
        for i in order
    ]
