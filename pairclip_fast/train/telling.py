"""Lines for the console: short, complete, one per moment."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.bottleneck import find_bottleneck
from pairclip_fast.telemetry.time_ledger import TimeTotals
from pairclip_fast.telemetry.timing import words_for_seconds

QUIET_SECONDS = 10.0
"""Least time between two lines where nobody is watching (no terminal)."""
SMALLEST_SHARE = 0.005
"""Phases below this share of the time are not named."""


class ConsoleLine:
    """The training line: where it is, how well, how fast, how long still."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._said = float("-inf")

    def say(self, fields: dict[str, Any], *, total_steps: int, epochs: int) -> None:
        """Say a `step` event; not every one if the console is no terminal."""
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._said < QUIET_SECONDS:
            return
        self._said = now
        eta = "?" if fields["eta_s"] is None else words_for_seconds(fields["eta_s"])
        self._events.say(
            f"step {fields['step']:,}/{total_steps:,}  epoch {fields['epoch'] + 1}/{epochs}"
            f"  loss {fields['loss']:.3f}  lr {fields['lr']:.1e}"
            f"  {fields['pairs_per_second']:,.0f} pairs/s  {fields['tflops']:.3g} TFLOP/s ({fields['peak_share']:.0%} of peak)"
            f"  {fields['pflop']:.3g} PFLOP so far"
            f"  data wait {fields['data_wait_fraction']:.0%}  ETA {eta}"
        )

    def say_ledgers(self, totals: TimeTotals, *, overhead: float, memory: dict[str, Any]) -> None:
        """Say what the memory was for, where the time went, and what limits the speed."""
        if memory["peak_gib"] is not None:
            items = ((row["item"], row["measured_gib"]) for row in memory["rows"])
            words = ", ".join(f"{item} {size:.2f}" for item, size in items if size is not None)
            self._events.say(f"memory: {memory['peak_gib']:.2f} GiB at the peak of training; by item: {words}")
        shares = totals.shares()
        found = find_bottleneck(shares)
        if found is None:
            return
        words = ", ".join(f"{phase} {share:.1%}" for phase, share in shares.items() if share >= SMALLEST_SHARE)
        self._events.say(f"time: {words} (measuring took {overhead:.2%})")
        self._events.say(f"bottleneck: {found.phase}, {found.share:.0%} of the time; {found.advice}")

    def say_evaluation(self, metrics: dict[str, Any], *, epoch: int, best: bool) -> None:
        """Say an `eval` event."""
        words = "  ".join(f"{name} {metrics[name]:.2%}" for name in ("top1", "top10", "top100"))
        self._events.say(f"epoch {epoch} held-out: {words}  MRR {metrics['mrr']:.4f}{'  (best so far)' if best else ''}")
        self._said = float("-inf")


def resume_command(run: Path) -> str:
    """The command that continues a run."""
    return f"pairclip-fast train --resume --out {shlex.quote(str(run))}"
