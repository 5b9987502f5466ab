"""Which figures the page has and what they show; how they are drawn is in `plots`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pairclip_fast.report.data import Evaluation, Run, number, samples_at, series
from pairclip_fast.report.plots import SERIES_COLOURS, Line, Plot, render, smooth
from pairclip_fast.report.results import percent
from pairclip_fast.report.words import shown

SMOOTH_SHARE = 40
"""The running median of the loss covers one in this many logged steps."""
LARGEST_LOGIT_SCALE = 10.0
"""In log space; the loss clamps it at ln 100, so only nonsense is cut."""
MEMORY_NAMES = {
    "cuda_allocated_gib": "GPU, tensors",
    "cuda_reserved_gib": "GPU, torch",
    "nvml_used_gib": "GPU, all",
    "rss_gib": "process",
    "peak_rss_gib": "process, peak",
    "cuda_peak_gib": "GPU, tensors at peak",
}
"""By what they say; the figure has room for the first four that a run has."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the page: its SVG, a title, what it says in words, and a caption."""

    svg: str
    title: str
    alt: str
    caption: str
    wide: bool = False
    key: tuple[tuple[str, str], ...] = ()
    """(label, page colour) of lines that lie too close to be labelled where they end."""


def curves(run: Run) -> list[Figure]:
    """The curves of the training, those that the run has values for."""
    steps, at = run.measured("step"), positions(run)
    scale = np.exp(np.minimum(series(steps, "logit_scale"), LARGEST_LOGIT_SCALE))
    resumes = [number(event.get("resumed_step")) for event in run.of_kind("run_started")]
    resumed = tuple(samples_at(run, [int(step) for step in resumes if step > 0]).tolist())
    found = [
        _accuracy(run, resumed),
        _loss(run, at, series(steps, "loss"), resumed),
        _simple("lr", at, series(steps, "lr"), "Learning rate", "after each logged step"),
        _simple("scale", at, scale, "Logit scale", "what cosines are multiplied by (1 / temperature); 100 at most", from_zero=True),
        _simple("grad", at, series(steps, "grad_norm"), "Gradient norm", "before clipping", faint=True, from_zero=True),
        _simple(
            "rate",
            at,
            series(steps, "pairs_per_second"),
            "Pairs per second",
            "in training, evaluations not counted",
            faint=True,
            from_zero=True,
        ),
        _simple(
            "wait",
            at,
            100 * series(steps, "data_wait_fraction"),
            "Waiting for data (%)",
            "share of the time spent waiting for the loader",
            faint=True,
            from_zero=True,
        ),
        _memory(at, steps),
    ]
    return [figure for figure in found if figure is not None]


def positions(run: Run) -> np.ndarray:
    """Pairs seen at each logged step."""
    return samples_at(run, [event["step"] for event in run.measured("step")])


def recall_curve(evaluations: list[Evaluation]) -> Figure | None:
    """Share of pairs whose true caption is among the first k, over k, per split, with chance."""
    lines = []
    usable = [evaluation for evaluation in evaluations if len(evaluation.arrays.get("ranks", ())) and evaluation.num_captions > 1]
    for evaluation, colour in zip(usable, SERIES_COLOURS, strict=False):
        ranks = np.sort(evaluation.arrays["ranks"])
        ks = np.unique(np.geomspace(1, evaluation.num_captions, 160).round())
        lines.append(Line("", ks, np.searchsorted(ranks, ks, side="right") / len(ranks), colour))
    if not lines:
        return None
    captions = usable[0].num_captions
    ks = np.unique(np.geomspace(1, captions, 160).round())
    plot = Plot(
        name="recall",
        lines=[Line("", ks, ks / captions, "muted"), *lines],
        y_label="pairs whose true caption is among the first k",
        x_label="k, of all captions",
        percent=True,
        log_x=True,
        wide=True,
    )
    key = tuple((shown(evaluation.split, limit=20), line.colour) for evaluation, line in zip(usable, lines, strict=False))
    at_ten = ", ".join(
        f"{shown(evaluation.split, limit=20)} {percent(float(np.mean(evaluation.arrays['ranks'] <= 10)))}" for evaluation in usable
    )
    alt = f"Recall at k on a logarithmic axis; at k = 10: {at_ten}."
    caption = "Among captions with equal scores the true one counts as the last."
    return Figure(render(plot), "How far down the true caption is", alt, caption, wide=True, key=(*key, ("chance", "muted")))


def _accuracy(run: Run, resumes: tuple[float, ...]) -> Figure | None:
    evals = run.measured("eval")
    splits = [str(event.get("split")) for event in evals]
    split = "val" if "val" in splits or not splits else splits[0]
    evals = [event for event in evals if str(event.get("split")) == split]
    at = samples_at(run, [event["step"] for event in evals])
    names = {"top100": "top-100", "top10": "top-10", "top1": "top-1"}
    lines = [
        Line(label, at, series(evals, "metrics", key), colour, markers=True)
        for (key, label), colour in zip(names.items(), ("c3", "c2", "c1"), strict=True)
    ]
    plot = Plot("accuracy", lines, "held-out pairs with the true caption among the first 1, 10, 100", percent=True, wide=True)
    svg = render(dataclasses.replace(plot, pflop_per_sample=_pflop_per_sample(run), resumes=resumes))
    if not svg:
        return None
    last = ", ".join(f"{line.label} {percent(float(line.y[np.isfinite(line.y)][-1]))}" for line in lines if not line.empty)
    alt = f"Accuracy after each evaluation; at the last one: {last}."
    return Figure(svg, "Held-out accuracy", alt, f"Split {shown(split, limit=40)}.", wide=True)


def _loss(run: Run, at: np.ndarray, loss: np.ndarray, resumes: tuple[float, ...]) -> Figure | None:
    window = max(3, len(loss) // SMOOTH_SHARE)
    smoothed = smooth(loss, window=window)
    lines = [Line("", at, loss, faint=True), Line("", at, smoothed)]
    if lines[0].empty:
        return None
    captions = number(run.plan.get("num_captions"))
    table = run.config.get("loss")
    is_bank = isinstance(table, dict) and table.get("kind") == "bank"
    chance = (math.log(captions), f"chance: ln {captions:,.0f}") if is_bank and captions > 1 else None
    plot = Plot("loss", lines, "nats per pair", reference=chance, wide=True, resumes=resumes, from_zero=True)
    good = smoothed[np.isfinite(smoothed)]
    alt = f"Loss over pairs seen, from {good[0]:.3g} to {good[-1]:.3g} nats."
    return Figure(render(plot), "Training loss", alt, f"Pale: as logged. Line: running median of {window} logged steps.", wide=True)


def _simple(
    name: str, at: np.ndarray, y: np.ndarray, title: str, caption: str, *, faint: bool = False, from_zero: bool = False
) -> Figure | None:
    window = max(3, len(y) // SMOOTH_SHARE)
    lines = [Line("", at, y, faint=True), Line("", at, smooth(y, window=window))] if faint else [Line("", at, y)]
    good = y[np.isfinite(y)]
    if not len(good):
        return None
    alt = f"{title} over pairs seen: first {good[0]:.3g}, median {np.median(good):.3g}, last {good[-1]:.3g}."
    return Figure(render(Plot(name, lines, "", from_zero=from_zero)), title, alt, caption)


def _memory(at: np.ndarray, steps: list[dict[str, object]]) -> Figure | None:
    found = [line for key, label in MEMORY_NAMES.items() if not (line := Line(label, at, series(steps, "memory", key))).empty]
    lines = [dataclasses.replace(line, colour=colour) for line, colour in zip(found, SERIES_COLOURS, strict=False)]
    if not lines:
        return None
    last = ", ".join(f"{line.label} {line.y[np.isfinite(line.y)][-1]:.2f}" for line in lines)
    return Figure(render(Plot("memory", lines, "", from_zero=True)), "Memory (GiB)", f"Memory in GiB, last values: {last}.", "")


def _pflop_per_sample(run: Run) -> float:
    """Training PFLOP per pair, by the log, else by the plan."""
    for event in reversed(run.of_kind("step")):
        pflop, samples = number(event.get("pflop")), number(event.get("samples_seen"))
        if pflop > 0 and samples > 0:
            return pflop / samples
    return number(run.plan.get("flops_per_pair")) / 1e15
