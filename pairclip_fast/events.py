"""What a run tells: one JSON line per event on disk, and the same facts in words on the console.

`events.jsonl` is the truth; console, TensorBoard, CSV and the HTML report are views of it. A line is written by one
`write` call, so a killed process leaves at most one partial last line, which the next attempt cuts off.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pairclip_fast.errors import printable

Event = dict[str, Any]
Sink = Callable[[Event], None]
PLAIN_PROGRESS_SECONDS = 10.0
MEASUREMENTS = ("step", "eval", "checkpoint")
"""Events that a resumed run may record again for the same step."""


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become None, so that every reader can parse every line."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def fields_of(event: Event) -> dict[str, Any]:
    """What was recorded, without what the log itself adds: to record it again in another log."""
    return {name: value for name, value in event.items() if name not in ("event", "time", "attempt")}


class EventLog:
    """Append-only event log with any number of further sinks.

    Args:
        path: The JSONL file, or None to keep nothing on disk (commands that have no run folder).
        console: Say fallbacks and notes on stderr as they come.
        attempt: How often this run was started; readers keep the last attempt of a step.
    """

    def __init__(self, path: Path | None = None, *, console: bool = True, attempt: int = 1) -> None:
        self.attempt = attempt
        self.fallbacks: list[Event] = []
        self._console = console
        self._sinks: list[Sink] = []
        self._descriptor: int | None = None
        self._disk_failed = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_partial_line(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def subscribe(self, sink: Sink) -> None:
        """Hand every later event to `sink` too."""
        self._sinks.append(sink)

    def emit(self, event: str, **fields: Any) -> None:
        """Record one event. Losing the log must not lose the training: a failing disk is said once."""
        record: Event = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **_finite(fields)}
        if self._descriptor is not None and not self._disk_failed:
            try:
                os.write(self._descriptor, json.dumps(record, ensure_ascii=True).encode() + b"\n")
            except OSError as error:
                self._disk_failed = True
                self.say(f"events are no longer written: {error}")
        for sink in self._sinks:
            sink(record)

    def fallback(self, what: str, *, chosen: str, reason: str) -> None:
        """Something better was not available: one event with its reason, said on the console and kept for the report."""
        if any((f["what"], f["chosen"], f["reason"]) == (what, chosen, reason) for f in self.fallbacks):
            return
        self.fallbacks.append({"what": what, "chosen": chosen, "reason": reason})
        self.emit("fallback", what=what, chosen=chosen, reason=reason)
        self.say(f"{what}: using {chosen} ({reason})")

    def note(self, message: str, **fields: Any) -> None:
        """A fact for the reader of the console and of the log."""
        self.emit("note", message=message, **fields)
        self.say(message)

    def say(self, message: str) -> None:
        """One line on the console only."""
        if self._console:
            _write_stderr(printable(message) + "\n")

    @contextlib.contextmanager
    def progress(self, description: str, total: int, *, unit: str = "it") -> Iterator[Callable[[int], None]]:
        """A bar with ETA on a terminal, a plain line every ten seconds elsewhere.

        Yields:
            A function to call with the number of units just finished.
        """
        if not self._console:
            yield lambda _count: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            console = Console(stderr=True)
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=4) as bar:
                task = bar.add_task(printable(description), total=total)
                yield lambda count: bar.advance(task, count)
        else:
            yield _PlainProgress(self, description, total, unit).advance

    def close(self) -> None:
        """Stop writing. Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _PlainProgress:
    """Progress for logs and pipes: few lines, each complete in itself."""

    def __init__(self, log: EventLog, description: str, total: int, unit: str) -> None:
        self.log, self.description, self.total, self.unit = log, description, total, unit
        self.done, self.started = 0, time.monotonic()
        self.said = self.started

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= PLAIN_PROGRESS_SECONDS:
            self.said = now
            eta = (now - self.started) / max(self.done, 1) * max(self.total - self.done, 0)
            self.log.say(f"{self.description}: {self.done:,}/{self.total:,} {self.unit}, about {eta:.0f} s left")


def read_events(path: Path) -> list[Event]:
    """All whole events of a log, in order; lines that are not JSON objects are left out.

    A step that was logged, lost by a crash and logged again after the resume appears twice, with two attempt numbers:
    use `last_attempts` to keep the later one.
    """
    events: list[Event] = []
    if not path.exists():
        return events
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line of a million brackets is junk too
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("event"), str):
                events.append(value)
    return events


def last_attempts(events: list[Event]) -> list[Event]:
    """The measurements that the run stands on, and all other events.

    A resume goes back to a checkpoint: what an earlier attempt measured after that step never happened for the weights
    that go on, even where the later attempt has not (or not at the same steps) measured again. So a `run_started` with
    `resumed_step` drops earlier steps beyond it (all of them if it started afresh), and of what was measured twice the
    later one stays. `signal`, `finished` and the like are history and are kept.
    """
    limit = math.inf
    seen: set[tuple[str, int, str]] = set()
    kept: list[Event] = []
    for event in reversed(events):
        step = event.get("step")
        if event["event"] == "run_started":
            resumed = event.get("resumed_step")
            limit = min(limit, resumed if isinstance(resumed, int) and resumed > 0 else -1)
        elif event["event"] in MEASUREMENTS and isinstance(step, int):
            key = (event["event"], step, str(event.get("split", "")))
            if step > limit or key in seen:
                continue
            seen.add(key)
        kept.append(event)
    return kept[::-1]


def _cut_partial_line(path: Path) -> None:
    """Drop what a killed process left behind the last line end."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _write_stderr(text: str) -> None:
    """A reader that went away (`| head`) is not a failure of ours."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
