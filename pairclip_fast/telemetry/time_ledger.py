"""Where the time of a training goes: every moment belongs to exactly one phase, so the phases sum to the wall time.

The loop says when a phase has ended (`lap`), and all that passed since the last lap was that phase. There is no second clock
that could disagree, and what nobody claimed is a phase too (`other`). On a GPU a lap records an event on the device's stream
and the ledger is one of device time: `wait` is then how long the device idled for data, not how long Python stood there.
A lap costs under a microsecond on a CPU (`lap_cost_s` measures it); marks are kept until `read` adds them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Phase = Literal["wait", "copy", "resize", "forward", "loss", "backward", "optimizer", "evaluation", "checkpoint", "telemetry", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
BETWEEN_STEPS: frozenset[Phase] = frozenset(("evaluation", "checkpoint"))
"""Phases that are no part of a training step: rates do not count them."""
LAPS_TIMED = 200


def seconds_between(earlier: float, later: float) -> float:
    """Of two marks of the host's clock."""
    return later - earlier


class TimeLedger:
    """Seconds per phase.

    Args:
        mark: A mark in time: the host's clock, or an event on a device's stream.
        between: Seconds from one mark to a later one; called by `read` only, when the device has passed both.
    """

    def __init__(self, *, mark: Callable[[], Any] = time.perf_counter, between: Callable[[Any, Any], float] = seconds_between) -> None:
        self._mark, self._between = mark, between
        self.observers: list[Callable[[Phase], None]] = []
        """Told the phase at each lap, before the next one begins: what they do is part of the next phase."""
        self.laps = 0
        """Since the ledger was made."""
        self.restart()

    def restart(self) -> None:
        """Begin now; what was not read is dropped."""
        self._ended: list[tuple[Phase, Any]] = []
        self._began = self._mark()

    def lap(self, phase: Phase) -> None:
        """All since the last lap was `phase`."""
        self._ended.append((phase, self._mark()))
        self.laps += 1
        for observe in self.observers:
            observe(phase)

    def read(self) -> dict[Phase, float]:
        """Seconds per phase since the last reading, up to the last lap; the device must have reached it."""
        seconds: dict[Phase, float] = {}
        for phase, mark in self._ended:
            seconds[phase] = seconds.get(phase, 0.0) + self._between(self._began, mark)
            self._began = mark
        self._ended = []
        return seconds


class TimeTotals:
    """The readings of a ledger added up."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}

    def add(self, reading: Mapping[Phase, float]) -> None:
        for phase, seconds in reading.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def shares(self) -> dict[Phase, float]:
        """Fractions of the total, largest first; empty before anything was added."""
        total = self.total_s
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {phase: seconds / total for phase, seconds in ordered} if total > 0 else {}


def lap_cost_s(ledger: TimeLedger) -> float:
    """Seconds that one lap of a ledger like `ledger` costs the host, by doing some."""
    twin = TimeLedger(mark=ledger._mark, between=ledger._between)
    started = time.perf_counter()
    for _ in range(LAPS_TIMED):
        twin.lap("other")
    return (time.perf_counter() - started) / LAPS_TIMED
