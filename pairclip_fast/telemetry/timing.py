"""How fast a training runs: rates over a window of steps, time left, and what the device could do at best.

Rates are counted over the window between two events, after the device has finished: no step is timed alone, so nothing waits
for the device more often than every `STEP_EVENT_SECONDS`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from pairclip_fast.telemetry.time_ledger import BETWEEN_STEPS, Phase, TimeLedger

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
    """Spent on these steps: evaluations and checkpoints are not counted."""
    pairs_per_second: float
    data_wait_fraction: float
    time_s: dict[Phase, float]
    """Seconds per phase, evaluations and checkpoints included."""


class StepMeter:
    """Counts steps and pairs between two readings of the time ledger.

    Args:
        ledger: Knows where the time went.
        clock: Monotonic seconds.
    """

    def __init__(self, ledger: TimeLedger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger, self._clock = ledger, clock
        self._steps = self._pairs = 0
        self.postpone()

    def postpone(self) -> None:
        """The next event is due a whole window from now, as after an evaluation."""
        self._started = self._clock()

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
        time_s = self._ledger.read()
        seconds = sum(value for phase, value in time_s.items() if phase not in BETWEEN_STEPS)
        rates = Rates(
            steps=self._steps,
            seconds=seconds,
            pairs_per_second=self._pairs / seconds if seconds > 0 else 0.0,
            data_wait_fraction=time_s.get("wait", 0.0) / seconds if seconds > 0 else 0.0,
            time_s=time_s,
        )
        self._steps = self._pairs = 0
        self.postpone()
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
