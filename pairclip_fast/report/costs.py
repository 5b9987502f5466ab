"""Where the time and the memory of a run went: the ledgers as tables, and what they advise.

Nothing in the log is trusted: a value that is no sensible number is an empty cell.
"""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import numpy as np

from pairclip_fast.events import Event
from pairclip_fast.report.data import Run, number, series
from pairclip_fast.report.figures import Figure
from pairclip_fast.report.history import duration
from pairclip_fast.report.plots import SERIES_COLOURS, Line, Plot, render
from pairclip_fast.report.results import percent
from pairclip_fast.report.words import shown
from pairclip_fast.telemetry.bottleneck import find_bottleneck
from pairclip_fast.telemetry.memory_ledger import Item
from pairclip_fast.telemetry.time_ledger import PHASES, Phase

MEANINGS: dict[Phase, str] = {
    "wait": "for the loader",
    "copy": "of batches to the device",
    "resize": "of tiles to the size of the phase (progressive resizing)",
    "forward": "pass of the encoder",
    "loss": "over the captions",
    "backward": "pass of loss and encoder",
    "optimizer": "guard, clipping, update, averages",
    "evaluation": "on held-out pairs",
    "checkpoint": "saving",
    "telemetry": "writing the log and the console",
    "other": "between the steps",
}
BACKGROUND = "load and augment"
"""The loader's own thread; its time passes beside the phases and is no part of their sum."""
MEMORY_ITEMS = get_args(Item)
ROWS_LIMIT = 20


@dataclasses.dataclass(frozen=True)
class TimeRow:
    """One phase."""

    phase: str
    meaning: str
    time: str
    share: str


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One item, in words; "" for what is not known."""

    item: str
    counted: str
    measured: str
    unexplained: str


def phase_seconds(run: Run) -> dict[Phase, float]:
    """Seconds per phase over all attempts, largest first."""
    totals = {phase: float(np.nansum(series(run.events, "time_s", phase))) for phase in PHASES}
    return {phase: seconds for phase, seconds in sorted(totals.items(), key=lambda item: -item[1]) if seconds > 0}


def time_rows(run: Run) -> list[TimeRow]:
    """The time ledger; empty for a run that kept none."""
    seconds = phase_seconds(run)
    total = sum(seconds.values())
    rows = [TimeRow(phase, MEANINGS[phase], duration(value), percent(value / total)) for phase, value in seconds.items()]
    background = float(np.nansum(series(run.measured("step"), "fill_s")))
    if rows and background > 0:
        rows.append(TimeRow(BACKGROUND, "in the loader's own thread, beside the phases above", duration(background), ""))
    return rows


def advice(run: Run) -> str:
    """The bottleneck and what to try next; "" without a ledger."""
    seconds = phase_seconds(run)
    total = sum(seconds.values())
    found = find_bottleneck({phase: value / total for phase, value in seconds.items()}) if total > 0 else None
    if found is None:
        return ""
    measuring = number((run.finished or {}).get("telemetry_share"))
    share = f" Measuring took {percent(measuring)}." if 0 <= measuring <= 1 else ""
    return f"Bottleneck: {found.phase}, {percent(found.share)} of the time; {found.advice}.{share}"


def memory_rows(run: Run) -> list[MemoryRow]:
    """The memory ledger of the latest attempt that got through an epoch."""
    event = _last(run)
    entries = event.get("rows")
    rows = []
    for entry in entries[:ROWS_LIMIT] if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("item") in MEMORY_ITEMS:
            sizes = (gib(number(entry.get(key))) for key in ("counted_gib", "measured_gib", "unexplained_gib"))
            rows.append(MemoryRow(shown(entry["item"], limit=40), *sizes))
    peak, explained, rest = (gib(number(event.get(key))) for key in ("peak_gib", "explained_gib", "unexplained_gib"))
    if rows and peak:
        rows.append(MemoryRow("peak of training", explained, peak, rest))
    evaluation = gib(number(event.get("peak_with_evaluation_gib")))
    if rows and evaluation:
        rows.append(MemoryRow("peak with evaluation", "", evaluation, ""))
    return rows


def time_figure(run: Run, at: np.ndarray) -> Figure | None:
    """Shares of the largest phases over the run."""
    steps = run.measured("step")
    table = np.nan_to_num(np.stack([series(steps, "time_s", phase) for phase in PHASES], axis=1)) if steps else np.zeros((0, len(PHASES)))
    sums = table.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(table, sums, out=np.full_like(table, math.nan), where=sums > 0)
    largest = np.argsort(-table.sum(axis=0))[: len(SERIES_COLOURS)]
    found = [Line(PHASES[n], at, shares[:, n], colour) for n, colour in zip(largest, SERIES_COLOURS, strict=True) if table[:, n].any()]
    if not found:
        return None
    middle = ", ".join(f"{line.label} {np.nanmedian(line.y):.0f} %" for line in found)
    lines = [dataclasses.replace(line, label="") for line in found]
    key = tuple((line.label, line.colour) for line in found)
    alt = f"Share of the time per phase; medians: {middle}."
    return Figure(render(Plot("phases", lines, "", from_zero=True)), "Where the time went (%)", alt, "The largest phases.", key=key)


def gib(size: float) -> str:
    """GiB in the unit that reads best, "" for NaN."""
    if not math.isfinite(size):
        return ""
    return f"{size:.2f} GiB" if abs(size) >= 1 else f"{1024 * size:,.0f} MiB"


def _last(run: Run) -> Event:
    """The latest `memory` event, or an empty one."""
    events = run.of_kind("memory")
    return events[-1] if events else {}
