"""How fast a training runs: rates over a window of steps, time left, and what the device could do at best.

Rates are counted over the window between two events, on the monotonic clock, after the device has finished: no step is
timed alone, so nothing waits for the device more often than every `STEP_EVENT_SECONDS`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

STEP_EVENT_SECONDS = 2.0
"""Least time between two `step` events."""
PEAK_MATRIX = 1024
"""Side of the matrices of the peak measurement on a CPU; 8 times that on CUDA, where 1024 does not fill the device."""
PEAK_SECONDS = 0.15


@dataclasses.dataclass(frozen=True)
class Rates:
    """What happened since the last reading."""

    steps: int
    seconds: float
    pairs_per_second: float
    data_wait_fraction: float


class StepMeter:
    """Counts steps and pairs between two readings.

    Args:
        waited: Total seconds that the training has waited for data so far.
        clock: Monotonic seconds.
    """

    def __init__(self, *, waited: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._waited, self._clock = waited, clock
        self._steps = self._pairs = 0
        self.restart()

    def restart(self) -> None:
        """Begin a window now, as after an evaluation."""
        self._steps = self._pairs = 0
        self._started, self._waited_before = self._clock(), self._waited()

    def count(self, pairs: int) -> None:
        """One more step with so many pairs."""
        self._steps += 1
        self._pairs += pairs

    @property
    def due(self) -> bool:
        """Whether a window is long enough for an event."""
        return self._clock() - self._started >= STEP_EVENT_SECONDS

    def read(self) -> Rates:
        """The rates of the window; begins the next one. A clock that stands still gives rates of 0, not a failure."""
        seconds = self._clock() - self._started
        waited = self._waited() - self._waited_before
        rates = Rates(
            steps=self._steps,
            seconds=max(seconds, 0.0),
            pairs_per_second=self._pairs / seconds if seconds > 0 else 0.0,
            data_wait_fraction=min(max(waited / seconds, 0.0), 1.0) if seconds > 0 else 0.0,
        )
        self.restart()
        return rates


def words_for_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def peak_tflops(device: torch.device, *, dtype: torch.dtype, synchronise: Callable[[], None]) -> float:
    """TFLOP/s of a large square matrix product of random numbers: the practical peak that shares are given of.

    Random, because the power limit of some devices makes products of zeros faster than any real one. The best of the
    repetitions within `PEAK_SECONDS` counts. The global random generators are not touched.
    """
    side = PEAK_MATRIX * (8 if device.type == "cuda" else 1)
    generator = torch.Generator(device=device).manual_seed(0)
    left = torch.randn(side, side, device=device, generator=generator).to(dtype)
    right = torch.randn(side, side, device=device, generator=generator).to(dtype)
    best, begin = float("inf"), time.monotonic()
    out = left @ right
    synchronise()
    while time.monotonic() - begin < PEAK_SECONDS or best == float("inf"):
        started = time.perf_counter()
        torch.matmul(left, right, out=out)
        synchronise()
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best / 1e12
