"""Ranking metrics against a sorted list, with ties, identical captions and wrong versions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pairclip_fast.metrics import PRECISION_K, TOP_K, pessimistic_ranks, ranking_metrics, side_accuracy, side_names, swap_rate


def brute_force(scores: np.ndarray, groups: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Sort every row, ties with the wrong captions first, and look."""
    sums: dict[str, list[float]] = {}
    for row, target in zip(scores, targets, strict=True):
        relevant = groups == groups[target]
        order = sorted(range(len(row)), key=lambda j: (-row[j], relevant[j]))
        hits = np.array([relevant[j] for j in order])
        first = int(np.flatnonzero(hits)[0]) + 1
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        values = {"mrr": 1 / first, "map": float(precision[hits].mean()), "rank": first}
        values |= {f"top{k}": float(hits[:k].any()) for k in TOP_K}
        values |= {f"precision{k}": hits[:k].sum() / k for k in PRECISION_K}
        values |= {f"recall{k}": hits[:k].sum() / hits.sum() for k in PRECISION_K}
        for name, value in values.items():
            sums.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in sums.items()} | {"median_rank": float(np.median(sums["rank"]))}


def counted(scores: np.ndarray, groups: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positive = groups[None, :] == groups[targets][:, None]
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    greater, equal = (~positive & (scores > own)).sum(axis=1), (~positive & (scores == own)).sum(axis=1)
    return greater, equal, positive.sum(axis=1)


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
def test_metrics_equal_a_sorted_list(seed: int, pairs: int, captions: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, kinds, captions)
    scores = rng.integers(0, 5, (pairs, kinds))[:, groups].astype(float)  # identical captions have identical scores
    targets = rng.integers(0, captions, pairs)
    greater, equal, positives = counted(scores, groups, targets)
    got = ranking_metrics(pessimistic_ranks(greater, equal), positives=positives)
    want = brute_force(scores, groups, targets)
    for name in ("top1", "top10", "top100", "mrr", "map", "median_rank"):
        assert got[name] == pytest.approx(want[name]), name
    for k in PRECISION_K:
        assert got["precision_at_k"][str(k)] == pytest.approx(want[f"precision{k}"])  # type: ignore[index]
        assert got["recall_at_k"][str(k)] == pytest.approx(want[f"recall{k}"])  # type: ignore[index]


def test_without_duplicates_the_textbook_identities_hold() -> None:
    ranks = np.array([1, 3, 11, 250])
    metrics = ranking_metrics(ranks)
    assert metrics["map"] == metrics["mrr"] == pytest.approx(float(np.mean(1 / ranks)))
    assert metrics["recall_at_k"]["10"] == metrics["top10"] == 0.5  # type: ignore[index]
    assert metrics["precision_at_k"]["10"] == pytest.approx(0.05)  # type: ignore[index]
    assert metrics["median_rank"] == 7.0


def test_ties_count_against_the_model() -> None:
    """All scores equal: the optimistic version would report 100 %."""
    greater, equal, positives = counted(np.zeros((5, 200)), np.arange(200), np.arange(5))
    honest = ranking_metrics(pessimistic_ranks(greater, equal), positives=positives)
    optimistic = ranking_metrics(pessimistic_ranks(greater, np.zeros_like(equal)), positives=positives)
    assert (honest["top1"], honest["top100"], honest["median_rank"]) == (0.0, 0.0, 200.0)
    assert optimistic["top1"] == 1.0


@pytest.mark.parametrize("ranks", [np.array([], dtype=np.int64), np.array([1, 0])])
def test_impossible_ranks_are_refused(ranks: np.ndarray) -> None:
    with pytest.raises(ValueError, match="ranks"):
        ranking_metrics(ranks)


def test_swap_rate_leaves_out_pairs_of_one_class() -> None:
    wins = np.array([True, False, True, True])
    assert swap_rate(wins, counted=np.array([True, True, False, False])) == 0.5
    assert swap_rate(wins, counted=np.zeros(4, dtype=bool)) is None


def test_side_accuracy() -> None:
    true, predicted = np.array([[0, 1], [0, 2], [2, 2]]), np.array([[0, 1], [1, 2], [2, 0]])
    left, right = side_accuracy(predicted, true, num_classes=3)
    assert [array.tolist() for array in left] == [[1, 0, 1], [2, 0, 1]]
    assert [array.tolist() for array in right] == [[0, 1, 1], [0, 1, 2]]
    assert side_names(2) == ("left", "right")
    assert side_names(1) == ("tile0",)
