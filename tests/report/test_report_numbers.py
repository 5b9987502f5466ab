"""The numbers behind the page, against counting by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.report import costs
from pairclip_fast.report.classes import confusions, side_results
from pairclip_fast.report.data import Evaluation, Run, number, read_run, samples_at
from pairclip_fast.report.figures import recall_curve
from pairclip_fast.report.history import duration, facts, utc
from pairclip_fast.report.plots import Line, Plot, _apart, render, smooth, thin
from pairclip_fast.report.results import chance, metric_rows, percent, standard_error

NAMES = ["a", "b", "c"]
MakeRun = Callable[..., Path]


def evaluation(**arrays: np.ndarray) -> Evaluation:
    return Evaluation("val", {"num_captions": 9, "num_pairs": len(arrays.get("ranks", ()))}, arrays, "here")


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0001, "0.01 %"), (0.4163, "41.6 %"), (0.0169, "1.69 %"), (1.0, "100 %"), (0.0, "0 %"), (1e-8, "1e-06 %"), (math.nan, "")],
)
def test_percent(fraction: float, text: str) -> None:
    assert percent(fraction) == text


@given(st.integers(1, 300))
def test_chance_is_what_random_ranks_give(captions: int) -> None:
    ranks = np.arange(1, captions + 1)  # each rank equally often
    for k in (1, 10, 100):
        assert chance(f"top{k}", num_captions=captions) == pytest.approx(np.mean(ranks <= k))
    assert chance("mrr", num_captions=captions) == pytest.approx(np.mean(1 / ranks))
    assert chance("median_rank", num_captions=captions) == pytest.approx(np.median(ranks))


def test_chance_of_a_side_is_one_class_in_all() -> None:
    assert chance("left_top1", num_captions=10_000) == pytest.approx(0.01)
    assert math.isnan(chance("unknown", num_captions=9))
    assert math.isnan(chance("top1", num_captions=0))


def test_standard_error_is_that_of_a_binomial() -> None:
    rng = np.random.default_rng(0)
    shares = rng.binomial(500, 0.3, 20_000) / 500
    assert standard_error(0.3, 500) == pytest.approx(shares.std(), rel=0.02)
    assert math.isnan(standard_error(1.2, 500))
    assert math.isnan(standard_error(0.5, math.nan))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60))
def test_confusions_are_counted_on_both_sides(pairs: list[tuple[int, int]]) -> None:
    truth, called = np.array(pairs).T
    found = confusions(evaluation(ranks=np.ones(len(pairs), int), caption_ids=truth, top_ids=called[:, None]), NAMES)
    wrong: Counter[tuple[str, str]] = Counter()
    shown_classes: Counter[str] = Counter()
    for true, answer in pairs:
        for side in (lambda i: i // 3, lambda i: i % 3):
            shown_classes[NAMES[side(true)]] += 1
            if side(true) != side(answer):
                wrong[(NAMES[side(true)], NAMES[side(answer)])] += 1
    assert {(item.true, item.called): item.count for item in found} == dict(wrong)
    assert all(item.share == pytest.approx(item.count / shown_classes[item.true]) for item in found)
    assert [item.count for item in found] == sorted((item.count for item in found), reverse=True)


def test_ids_outside_the_bank_are_not_confusions() -> None:
    odd = evaluation(ranks=np.ones(3, int), caption_ids=np.array([0, 99, 4]), top_ids=np.array([[-1], [1], [4]]))
    assert confusions(odd, NAMES) == []
    assert confusions(odd, []) == []


def test_classes_without_a_pair_are_left_out() -> None:
    arrays = {"per_class_left_correct": np.array([1, 0, 3]), "per_class_left_total": np.array([2, 0, 3])}
    (left,) = side_results(evaluation(**arrays), NAMES)
    assert [(item.name, item.share) for item in left.strip] == [("a", 0.5), ("c", 1.0)]
    assert left.mean == pytest.approx(0.75)
    assert left.worst[0].name == "a"
    assert left.best[0].name == "c"
    assert side_results(evaluation(**arrays), [])[0].strip[1].name == "class 2", "without a manifest there are numbers"


def test_evaluations_are_placed_by_the_samples_of_the_steps(fake_run: Callable[..., Path]) -> None:
    run = read_run(fake_run(epochs=2, resumed=False, splits=(), pictures=False))
    assert samples_at(run, [90, 180]).tolist() == [90 * 256, 180 * 256]
    assert samples_at(run, [85, 200]).tolist() == [85 * 256, 200 * 256], "between and beyond the logged steps"
    assert samples_at(run, []).tolist() == []


def test_a_better_evaluation_event_is_not_replaced_by_a_later_worse_one(fake_run: Callable[..., Path]) -> None:
    folder = fake_run(epochs=2, resumed=False, splits=(), pictures=False)
    with (folder / "events.jsonl").open("a") as log:
        log.write('{"event": "eval", "step": 181, "split": "val", "best": false, "metrics": {"top1": 0.0001}}\n')
        log.write('{"event": "eval", "step": 182, "split": "test", "metrics": {"top1": 0.5}}\n')
    evaluations = read_run(folder).evaluations
    assert evaluations["val"].origin == "step 180"
    assert list(evaluations) == ["test", "val"], "the most telling first"


def test_metric_rows_without_metrics() -> None:
    assert metric_rows([Evaluation("val", {}, {}, "here")]) == []
    assert metric_rows([]) == []


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=3_000), st.integers(2, 50))
def test_thinned_lines_keep_their_end_and_their_range(values: list[float], points: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    thin_x, thin_y = thin(x, y, points=points)
    assert len(thin_x) == len(thin_y) == min(points, len(y))
    assert (thin_x[-1], thin_y[-1]) == (x[-1], y[-1])
    assert np.all(np.diff(thin_x) > 0)
    assert y.min() - 1e-9 <= thin_y.min() <= thin_y.max() <= y.max() + 1e-9


def test_smoothing_ignores_gaps_and_spikes() -> None:
    y = np.array([1.0, 1.0, 50.0, math.nan, 1.0, 1.0])
    assert smooth(y, window=5).tolist() == [1.0] * 6
    assert math.isnan(smooth(np.array([math.nan]), window=3)[0])


def test_labels_keep_apart_and_inside() -> None:
    assert _apart([1.0, 50.0], gap=10, top=100) == [1.0, 50.0]
    assert _apart([95.0, 96.0, 97.0], gap=10, top=100) == [80.0, 90.0, 100.0]
    assert _apart([], gap=10, top=100) == []


def test_a_plot_of_nothing_is_nothing() -> None:
    empty = Line("x", np.array([1.0]), np.array([math.nan]))
    assert render(Plot("p", [empty], "y")) == ""
    assert render(Plot("p", [], "y")) == ""
    assert recall_curve([]) is None


def test_a_plot_follows_the_colours_of_the_page_and_escapes_labels() -> None:
    line = Line("<b>$x_1$ & co", np.array([1.0, 2.0]), np.array([3.0, 5e7]))
    svg = render(Plot("p", [line], "y", pflop_per_sample=1e-9))
    assert "var(--c1)" in svg
    assert "#0" not in svg.replace('href="#', "")
    assert "&lt;b&gt;$x_1$ &amp; co" in svg
    assert "DOCTYPE" not in svg
    assert render(Plot("p", [line], "y", pflop_per_sample=1e-9)) == svg


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (2.5, 2.5), (True, None), ("3", None), (None, None), (10**400, None), (1e31, None)]
)
def test_number(value: object, expected: float | None) -> None:
    result = number(value)
    assert result == expected if expected is not None else math.isnan(result)


def test_times_and_facts() -> None:
    assert duration(59.96) == "60.0 s"
    assert duration(227) == "3 min 47 s"
    assert duration(7322) == "2 h 02 min"
    assert duration(-1) == duration(math.nan) == ""
    assert utc(0) == "1970-01-01 00:00:00"
    assert utc(1e300) == utc("now") == utc(None) == ""
    table = {"a": {"b": 1, "c": {}}, "d": [1, 2.5], "e": [{"f": True}], "g": None}
    assert facts(table) == [("a.b", "1"), ("a.c", "-"), ("d", "1, 2.5"), ("e[0].f", "yes"), ("g", "-")]
    assert len(facts({str(index): index for index in range(5_000)})) < 500


def test_the_ledgers_are_added_up_over_the_log(fake_run: MakeRun) -> None:
    run = read_run(fake_run(epochs=2, resumed=False, finished=True))
    steps = len(run.measured("step"))
    seconds = costs.phase_seconds(run)
    assert seconds["backward"] == pytest.approx(1.2 * steps)
    assert seconds["evaluation"] == 3.0
    assert next(iter(seconds)) == "backward"
    rows = costs.time_rows(run)
    assert rows[-1].phase == costs.BACKGROUND
    assert rows[-1].share == "", "it passes beside the others"
    shares = [float(row.share.rstrip(" %")) for row in rows[:-1]]
    assert sum(shares) == pytest.approx(100.0, abs=0.5)
    assert "Bottleneck: backward" in costs.advice(run)
    assert "0.05" in costs.advice(run)


def test_the_memory_ledger_has_empty_cells_for_what_is_not_known(fake_run: MakeRun) -> None:
    rows = costs.memory_rows(read_run(fake_run(epochs=1, resumed=False, finished=True)))
    assert [row.item for row in rows] == ["process", "model", "activations", "peak of training", "peak with evaluation"]
    assert (rows[0].counted, rows[0].measured, rows[0].unexplained) == ("", "717 MiB", "")
    assert (rows[3].counted, rows[3].measured, rows[3].unexplained) == ("1.50 GiB", "1.70 GiB", "205 MiB")


def test_a_run_without_ledgers_says_nothing_about_them() -> None:
    run = Run("old", {}, {}, {}, {}, [{"event": "step", "step": 1, "loss": 1.0}], 0, {}, [])
    assert (costs.time_rows(run), costs.memory_rows(run), costs.advice(run)) == ([], [], "")
    assert costs.time_figure(run, np.zeros(1)) is None
