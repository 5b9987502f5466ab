"""The result in words and as a table: what was measured, what chance gives, what the original report claimed."""

from __future__ import annotations

import dataclasses
import math

from pairclip_fast.report.data import Evaluation, Run, number
from pairclip_fast.report.words import first_line, shown


@dataclasses.dataclass(frozen=True)
class Claim:
    """A figure of the original technical report; its baseline was measured on training images, its hopes not at all."""

    baseline: str
    hoped: str


CLAIMS = {"top1": Claim("0.24 %", "2 - 5 %"), "top10": Claim("1.69 %", "15 - 25 %"), "top100": Claim("10.97 %", "40 - 60 %")}
"""Source: the original report, sections 1.2 and 4.1."""

METRICS = {
    "top1": ("Top-1", "the true caption is ranked first among all captions"),
    "top10": ("Top-10", "it is among the first ten"),
    "top100": ("Top-100", "it is among the first hundred"),
    "left_top1": ("Left class", "the best caption names the left photo correctly"),
    "right_top1": ("Right class", "the best caption names the right photo correctly"),
    "swap_rate": ("Swap rate", "the caption with left and right exchanged scores above the true one; lower is better"),
    "mrr": ("MRR", "mean of 1 / rank"),
    "map": ("mAP", "mean average precision; equals MRR while each pair has one true caption"),
    "median_rank": ("Median rank", "half of the pairs rank their caption at least this high; 1 is best"),
}
PERCENT = ("top1", "top10", "top100", "left_top1", "right_top1", "swap_rate")


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One line of the metrics table; texts are ready to show, "" where nothing is known."""

    label: str
    meaning: str
    values: list[str]
    chance: str
    ratio: str
    baseline: str
    hoped: str


@dataclasses.dataclass(frozen=True)
class Headline:
    """The first thing a reader sees.

    Args:
        state: "finished", "stopped", "failed" or "open".
        state_text: How the run ended, or that no end is on record.
        sentence: The result in one sentence.
        split: Split it was measured on, "" without any evaluation.
        figures: (label, value, chance and ratio) of top-1, top-10 and top-100.
    """

    state: str
    state_text: str
    sentence: str
    split: str
    figures: list[tuple[str, str, str]]


def percent(fraction: float) -> str:
    """A fraction as per cent with three significant digits, "" for NaN."""
    if not math.isfinite(fraction):
        return ""
    value = 100.0 * fraction
    if value == 0.0:
        return "0 %"
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(abs(value)))))}f} %" if abs(value) >= 0.01 else f"{value:.2g} %"


def chance(metric: str, *, num_captions: int) -> float:
    """What ranking `num_captions` distinct captions at random gives, NaN where undefined.

    The class metrics take the bank to be all pairs of sqrt(num_captions) classes. MRR is H_N / N.
    """
    if num_captions < 1:
        return math.nan
    known = {"top1": 1, "top10": 10, "top100": 100}
    if metric in known:
        return min(1.0, known[metric] / num_captions)
    if metric in ("left_top1", "right_top1"):
        return 1.0 / math.sqrt(num_captions)
    if metric in ("mrr", "map"):
        return math.fsum(1.0 / rank for rank in range(1, num_captions + 1)) / num_captions if num_captions <= 10_000_000 else math.nan
    return {"median_rank": (num_captions + 1) / 2, "swap_rate": 0.5}.get(metric, math.nan)


def ratio_to_chance(evaluation: Evaluation, metric: str = "top1") -> float:
    """How many times better than chance; NaN where either is unknown."""
    by_chance = chance(metric, num_captions=evaluation.num_captions)
    return evaluation.number(metric) / by_chance if by_chance else math.nan


def standard_error(fraction: float, count: float) -> float:
    """Binomial standard error of a fraction of `count` pairs, taken as independent; NaN where unknown."""
    if not (math.isfinite(fraction) and count >= 1 and 0.0 <= fraction <= 1.0):
        return math.nan
    return math.sqrt(fraction * (1.0 - fraction) / count)


def metric_rows(evaluations: list[Evaluation]) -> list[MetricRow]:
    """The metrics table, one value per evaluation; metrics that no evaluation has are left out."""
    rows = []
    for key, (label, meaning) in METRICS.items():
        values = [_value_text(evaluation, key) for evaluation in evaluations]
        if not any(values):
            continue
        by_chance = chance(key, num_captions=evaluations[0].num_captions)
        ratio = ratio_to_chance(evaluations[0], key) if key not in ("median_rank", "swap_rate") else math.nan
        claim = CLAIMS.get(key, Claim("", ""))
        chance_text = percent(by_chance) if key in PERCENT else _plain(by_chance)
        rows.append(MetricRow(label, meaning, values, chance_text, _times(ratio), claim.baseline, claim.hoped))
    for key, name in (("precision_at_k", "Precision"), ("recall_at_k", "Recall")):
        rows.extend(_at_k_rows(evaluations, key, name))
    return rows


def headline(run: Run) -> Headline:
    """The first evaluation of `run` (test before validation) in one sentence, and how the run ended."""
    state, state_text = _state(run)
    if not run.evaluations:
        return Headline(state, state_text, "Nothing has been evaluated yet.", "", [])
    evaluation = next(iter(run.evaluations.values()))
    count, captions, top1 = evaluation.number("num_pairs"), evaluation.num_captions, evaluation.number("top1")
    kind = "training" if evaluation.split == "train" else "held-out"
    pairs = f"{count:,.0f} {kind} pairs" if math.isfinite(count) else f"{kind} pairs"
    among = f"{captions:,} captions" if captions else "all captions"
    ratio = ratio_to_chance(evaluation)
    times = f", {_times(ratio)} what chance gives" if math.isfinite(ratio) else ""
    result = f"the true caption ranks first among {among} for {percent(top1)}{times}." if math.isfinite(top1) else "no top-1 was recorded."
    figures = []
    for key in ("top1", "top10", "top100"):
        value = percent(evaluation.number(key))
        by_chance, factor = percent(chance(key, num_captions=captions)), _times(ratio_to_chance(evaluation, key))
        figures.append((METRICS[key][0], value or "-", f"chance {by_chance}, {factor}" if by_chance and factor else ""))
    return Headline(state, state_text, f"On {pairs} (split {shown(evaluation.split, limit=40)}), {result}", evaluation.split, figures)


def _state(run: Run) -> tuple[str, str]:
    finished = run.finished
    if finished is None:
        steps = [event["step"] for event in run.measured("step")]
        at = f"last logged step {steps[-1]:,}" if steps else "no step logged yet"
        return "open", f"No end on record: the run is still going or was killed ({at})."
    reason = finished.get("reason")
    if reason == "failed":
        return "failed", f"Failed: {first_line(finished.get('error'))}."
    step = number(finished.get("step"))
    at = f" at step {step:,.0f}" if math.isfinite(step) else ""
    words = {
        "epochs": "All epochs done",
        "early_stop": "Stopped early: no better held-out top-1 within the patience",
        "interrupted": "Interrupted",
    }
    return "stopped" if reason == "interrupted" else "finished", f"{words.get(str(reason), shown(reason))}{at}."


def _value_text(evaluation: Evaluation, key: str) -> str:
    value = evaluation.number(key)
    if key not in PERCENT:
        return _plain(value)
    error = standard_error(value, evaluation.number("num_pairs"))
    return f"{percent(value)} \u00b1 {100 * error:#.2g}" if math.isfinite(error) and error > 0 else percent(value)


def _at_k_rows(evaluations: list[Evaluation], key: str, name: str) -> list[MetricRow]:
    """Rows of a {k: value} metric, whichever k were recorded; what equals a top-k above is not repeated."""
    tables = [table if isinstance(table := evaluation.metrics.get(key), dict) else {} for evaluation in evaluations]
    ks = sorted({str(k) for table in tables for k in table if str(k).isascii() and str(k).isdigit()}, key=lambda k: (len(k), k))
    rows = []
    for k in ks[:12]:
        if k == "1" or (key == "recall_at_k" and k in ("10", "100")) or len(k) > 9:
            continue
        values = [percent(number(table.get(k))) for table in tables]
        rows.append(MetricRow(f"{name} at {k}", "", values, "", "", "", ""))
    return rows


def _plain(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _times(ratio: float) -> str:
    if not math.isfinite(ratio):
        return ""
    return f"{ratio:,.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"
