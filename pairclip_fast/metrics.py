"""Ranking metrics from counts: how many captions beat the true one, never a sorted list.

Everything here is plain numpy over one number per pair, so it does not depend on batches, devices or processes. Ties count
against the model: an encoder that gives every caption the same score is as bad as it can be, not perfect.
Captions that are identical are positives of each other. They share one score, hence stand side by side in the ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

TOP_K = (1, 10, 100)
PRECISION_K = (1, 5, 10, 100)


def pessimistic_ranks(greater: Int[np.ndarray, " pairs"], equal: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """Rank of the true caption, from 1: behind all captions that score higher and all that score the same."""
    return (1 + greater.astype(np.int64) + equal.astype(np.int64)).astype(np.int64)


def ranking_metrics(ranks: Int[np.ndarray, " pairs"], *, positives: Int[np.ndarray, " pairs"] | None = None) -> dict[str, object]:
    """Top-k accuracy, MRR, median rank, mAP, precision and recall at k.

    Args:
        ranks: Rank of the best true caption of each pair, from 1.
        positives: How many captions are identical to the true one, itself included; None for 1 everywhere. They take the
            places `rank .. rank + positives - 1`.

    Returns:
        `top1`, `top10`, `top100`, `mrr`, `median_rank`, `map`, `precision_at_k` and `recall_at_k` ({"k": value}); fractions.
        With one positive per pair `map` equals `mrr`, recall at k is top-k, and precision at k is top-k divided by k.

    Raises:
        ValueError: no pairs, or a rank below 1.
    """
    if ranks.size == 0 or int(ranks.min()) < 1:
        raise ValueError(f"ranks: expected at least one, each 1 or more, got {ranks.size} from {ranks.min() if ranks.size else 'none'}")
    positives = np.ones_like(ranks) if positives is None else positives
    found = {k: np.clip(k + 1 - ranks, 0, positives) for k in PRECISION_K}
    return {
        **{f"top{k}": float((ranks <= k).mean()) for k in TOP_K},
        "mrr": float((1.0 / ranks).mean()),
        "median_rank": float(np.median(ranks)),
        "map": float(_average_precision(ranks, positives).mean()),
        "precision_at_k": {str(k): float((count / k).mean()) for k, count in found.items()},
        "recall_at_k": {str(k): float((count / positives).mean()) for k, count in found.items()},
    }


def _average_precision(ranks: Int[np.ndarray, " pairs"], positives: Int[np.ndarray, " pairs"]) -> np.ndarray:
    """Mean over the positives of (positives seen) / (places seen); pairs with equal counts are computed together."""
    result = np.empty(len(ranks))
    for count in np.unique(positives):
        chosen, seen = positives == count, np.arange(1, count + 1)
        total = np.zeros(int(chosen.sum()))
        for m in seen:  # a loop over the positives, not a [pairs, positives] table: banks of one repeated caption exist
            total += m / (ranks[chosen] - 1 + m)
        result[chosen] = total / count
    return result


def swap_rate(swap_wins: Bool[np.ndarray, " pairs"], *, counted: Bool[np.ndarray, " pairs"]) -> float | None:
    """How often the caption with left and right exchanged scores at least as high as the true one.

    Args:
        swap_wins: Per pair, whether it does.
        counted: Pairs whose swapped caption is another caption; the others cannot be told apart by definition.

    Returns:
        The fraction, or None if no pair counts.
    """
    return float(swap_wins[counted].mean()) if counted.any() else None


def side_accuracy(
    predicted: Int[np.ndarray, "pairs sides"], true: Int[np.ndarray, "pairs sides"], *, num_classes: int
) -> list[tuple[Int[np.ndarray, " classes"], Int[np.ndarray, " classes"]]]:
    """Per side, correct and total pairs of each true class.

    Args:
        predicted: Class of each tile in the top-ranked caption.
        true: Class of each tile.
        num_classes: Number of classes.
    """
    sides = []
    for side in range(true.shape[1]):
        hits = predicted[:, side] == true[:, side]
        correct = np.bincount(true[hits, side], minlength=num_classes)
        sides.append((correct.astype(np.int64), np.bincount(true[:, side], minlength=num_classes).astype(np.int64)))
    return sides


def side_names(sides: int) -> Sequence[str]:
    """`left` and `right` for two tiles; numbered otherwise."""
    return ("left", "right") if sides == 2 else tuple(f"tile{side}" for side in range(sides))
