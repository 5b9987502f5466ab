"""What the memory of a training is for: phase by phase what can be counted, what was measured, and what is left unexplained.

Weights, gradients, optimizer state, caption bank and batches are counted exactly from the tensors; activations from what
autograd keeps. Beside each stands the growth that the allocator reports for its phase of the first step. The same ledger
serves a CPU and a GPU: only the reading differs. A value that could not be read is None and printed as an empty cell.

DALI tells the size of its buffers only with `exec_dynamic=False` (its documentation of `executor_statistics`), whose batches
one would have to copy. They are measured instead: on a CPU they are in the growth of the loader beyond what is counted; on a
GPU they are what the device holds outside of torch's pool since the loader started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pairclip_fast.telemetry.memory import GIB, MemoryReading
from pairclip_fast.telemetry.time_ledger import Phase

Point = Literal["start", "model", "ready", "copy", "loss", "backward", "optimizer", "training", "evaluation"]
"""Moments at which memory is read: before the model, with it, before the first step, then within it, and after an epoch."""
Item = Literal["process", "model", "loader", "loader's pools", "activations", "gradients", "optimizer"]
SPANS: Mapping[Item, tuple[Point, Point, Literal["allocated", "outside"]]] = {
    "model": ("start", "model", "allocated"),
    "loader": ("ready", "copy", "allocated"),
    "loader's pools": ("ready", "copy", "outside"),
    "activations": ("copy", "loss", "allocated"),
    "gradients": ("copy", "backward", "allocated"),  # the activations are free again by then
    "optimizer": ("backward", "optimizer", "allocated"),
}
"""Between which two points an item's memory appears, and in which part of a reading."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One item of the ledger, in bytes."""

    item: Item
    counted: int | None
    """From the tensors; None for what has no tensors of ours."""
    measured: int | None
    """Growth of what is allocated; for the process itself what it held before the model was there."""

    @property
    def unexplained(self) -> int | None:
        """Measured beyond counted."""
        return None if self.counted is None or self.measured is None else self.measured - self.counted


class MemoryLedger:
    """Readings at the points of a run.

    Args:
        read: The device's memory now.
        forget_peak: Gives free memory back to the system and counts the peak anew.
    """

    def __init__(self, *, read: Callable[[], MemoryReading], forget_peak: Callable[[], object]) -> None:
        self._read, self._forget_peak = read, forget_peak
        self.points: dict[Point, MemoryReading] = {}
        self.note("start")

    def note(self, point: Point) -> None:
        """Read the memory at `point`, if it was not reached before."""
        if point not in self.points:
            if point == "ready":  # what planning needed is over
                self._forget_peak()
            self.points[point] = self._read()

    def note_lap(self, phase: Phase) -> None:
        """For a time ledger's observers: the end of a phase of the first step is a point too."""
        if "ready" in self.points and phase in ("copy", "loss", "backward", "optimizer"):
            self.note(phase)

    def rows(self, counted: Mapping[str, int | None]) -> list[MemoryRow]:
        """The ledger of the points reached so far.

        Args:
            counted: Bytes per item, as far as they can be counted.
        """
        start = self.points["start"]
        rows = [MemoryRow(item="process", counted=None, measured=start.reserved)]
        for item, (before, after, part) in SPANS.items():
            if after in self.points:
                measured = growth(getattr(self.points.get(before), part, None), getattr(self.points[after], part))
                if item in counted or measured is not None:  # a host has no pools outside
                    rows.append(MemoryRow(item=item, counted=counted.get(item), measured=measured))
        return rows

    def to_json(self, counted: Mapping[str, int | None]) -> dict[str, Any]:
        """Fields of the `memory` event, in GiB: the rows, what was held before the first step, the peak and what explains it."""
        rows = self.rows(counted)
        held = self.points["ready"].reserved if "ready" in self.points else None
        training, evaluation = (self.points[point].peak if point in self.points else None for point in ("training", "evaluation"))
        explained = explained_peak(held, counted)
        return {
            "rows": [
                {
                    "item": row.item,
                    "counted_gib": in_gib(row.counted),
                    "measured_gib": in_gib(row.measured),
                    "unexplained_gib": in_gib(row.unexplained),
                }
                for row in rows
            ],
            "ready_gib": in_gib(held),
            "peak_gib": in_gib(training),
            "peak_with_evaluation_gib": in_gib(evaluation),
            "explained_gib": in_gib(explained),
            "unexplained_gib": None if training is None or explained is None else in_gib(training - explained),
        }


def growth(before: int | None, after: int | None) -> int | None:
    """Between two readings of bytes."""
    return None if before is None or after is None else after - before


def explained_peak(held: int | None, counted: Mapping[str, int | None]) -> int | None:
    """What the countable items add up to at the worst moment of a step, on top of what was held before the first one.

    Gradients appear while activations go, so the larger of the two counts; optimizer state stays.
    """
    if held is None:
        return None
    sizes = {item: size or 0 for item, size in counted.items()}
    return held + sizes.get("loader", 0) + sizes.get("optimizer", 0) + max(sizes.get("activations", 0), sizes.get("gradients", 0))


def in_gib(size: int | None) -> float | None:
    """Bytes as GiB; what is not known stays so."""
    return None if size is None else size / GIB
