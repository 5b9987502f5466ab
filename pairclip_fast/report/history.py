"""What happened to the run: attempts, resumes, checkpoints, signals and the end, and what it had to make do with."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from typing import Any

from pairclip_fast.events import Event
from pairclip_fast.report.data import Run, number
from pairclip_fast.report.words import first_line, shown

FACTS_LIMIT = 400
"""Rows of the configuration or environment table."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """One line of the timeline; `tone` is "good", "bad" or ""."""

    time: str
    attempt: str
    what: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Something better was not available."""

    what: str
    chosen: str
    reason: str
    attempts: str


def timeline(run: Run) -> list[Moment]:
    """Attempts, signals and ends in order; the evaluations and checkpoints of an attempt are one line each."""
    moments: list[Moment] = []
    counted: dict[str, list[Event]] = {"eval": [], "checkpoint": []}

    def flush() -> None:
        for kind, events in counted.items():
            if events:
                moments.append(_counted(kind, events))
                events.clear()

    ended = True
    for event in run.events:
        kind = event["event"]
        if kind == "run_started" and not ended:
            flush()
            moments.append(Moment("", "", "No end on record: the process was killed or the machine stopped", "bad"))
        ended = kind == "finished" if kind in ("run_started", "finished") else ended
        if kind in counted:
            counted[kind].append(event)
        elif kind in ("run_started", "signal", "finished", "numerics"):
            flush()
            text, tone = _described(event)
            moments.append(Moment(utc(event.get("time")), shown(event.get("attempt", "")), text, tone))
    flush()
    return moments


def fallbacks(run: Run) -> list[Fallback]:
    """Every fallback taken, once, with the attempts that took it; also those taken before the log was opened."""
    found: dict[tuple[str, str, str], list[str]] = {}
    recorded = run.environment.get("fallbacks")
    earlier = [entry for entry in recorded if isinstance(entry, dict)] if isinstance(recorded, list) else []
    for event in [*run.of_kind("fallback"), *earlier]:
        key = (shown(event.get("what", "")), shown(event.get("chosen", "")), shown(event.get("reason", ""), limit=600))
        attempt = shown(event.get("attempt", ""))
        if attempt not in found.setdefault(key, []) and attempt:
            found[key].append(attempt)
    return [Fallback(*key, ", ".join(attempts)) for key, attempts in found.items()]


def notes(run: Run) -> list[Moment]:
    """What was said in words: when the data was made, then by the run, in order."""
    made = run.manifest.get("notes")
    return [Moment("", "data", shown(note, limit=600)) for note in (made if isinstance(made, list) else [])] + [
        Moment(utc(event.get("time")), shown(event.get("attempt", "")), shown(event.get("message", ""), limit=600))
        for event in run.of_kind("note")
    ]


def facts(table: dict[str, Any]) -> list[tuple[str, str]]:
    """A nested table as (dotted key, value) rows, in the order of the file; long lists on one line, shortened."""
    rows: list[tuple[str, str]] = []
    pending: list[tuple[str, Any]] = [("", table)]
    while pending and len(rows) < FACTS_LIMIT:
        prefix, value = pending.pop()
        if isinstance(value, dict) and value:
            nested = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
            pending.extend(reversed(nested))
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            pending.extend(reversed([(f"{prefix}[{index}]", item) for index, item in enumerate(value)]))
        else:
            rows.append((shown(prefix), _fact(value)))
    if pending:
        rows.append(("...", "more is in the file"))
    return rows


def utc(stamp: object) -> str:
    """Seconds since 1970 as a UTC date and time, "" for what is none."""
    seconds = number(stamp)
    if not (math.isfinite(seconds) and 0 <= seconds < 253_402_300_800):
        return ""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, "" for NaN."""
    if not math.isfinite(seconds) or seconds < 0:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return shown(", ".join(_fact(item) for item in value[:200]), limit=400)
    return "-" if value is None or value in ("", {}) else shown(value, limit=400)


def _described(event: Event) -> tuple[str, str]:
    step = number(event.get("step"))
    at = f" at step {step:,.0f}" if math.isfinite(step) else ""
    if event["event"] == "signal":
        return f"Signal {shown(event.get('name', ''))}{at}", "bad"
    if event["event"] == "numerics":
        return f"Loss or gradient stopped being finite{at}", "bad"
    if event["event"] == "finished":
        reason = event.get("reason")
        words = {"epochs": "Finished: all epochs done", "early_stop": "Finished: stopped early", "interrupted": "Stopped: interrupted"}
        took = duration(number(event.get("seconds")))
        text = f"Failed: {first_line(event.get('error'))}" if reason == "failed" else words.get(str(reason), f"Ended: {shown(reason)}")
        return text + at + (f", after {took}" if took else ""), "bad" if reason in ("interrupted", "failed") else "good"
    resumed = number(event.get("resumed_step"))
    return (f"Resumed from step {resumed:,.0f}" if resumed > 0 else "Started"), ""


def _counted(kind: str, events: list[Event]) -> Moment:
    steps = [number(event.get("step")) for event in events]
    last = f"{steps[-1]:,.0f}" if math.isfinite(steps[-1]) else "?"
    name = {"eval": "evaluation", "checkpoint": "checkpoint"}[kind]
    text = f"{len(events):,} {name}{'s' if len(events) != 1 else ''}, the last at step {last}"
    return Moment(utc(events[-1].get("time")), shown(events[-1].get("attempt", "")), text)
