"""From a time ledger to the one thing to try next.

Computing is what a training is for. So any other phase that takes more than it should is the bottleneck, the one furthest
above its tolerable share first; if there is none, it is the larger half of the computing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pairclip_fast.telemetry.time_ledger import Phase

TOLERABLE: Mapping[Phase, float] = {
    "wait": 0.05,
    "copy": 0.05,
    "resize": 0.05,
    "loss": 0.10,
    "optimizer": 0.15,
    "evaluation": 0.20,
    "checkpoint": 0.05,
    "telemetry": 0.01,
    "other": 0.03,
}
"""Shares of the time that are no reason to act; judgement, not measurement."""
ADVICE: Mapping[Phase, str] = {
    "wait": "the loader is behind: try --loader native or dali, fewer augmentations, or leave it more cores",
    "copy": "copies to the device: try a larger --batch-size, or a loader that fills batches on the device (--loader dali)",
    "resize": "resizing the tiles for this phase: fewer sizes in train.progressive, or none",
    "forward": "the model's forward pass: try --amp, --compile on, a larger --batch-size or a smaller preset",
    "loss": "the loss over the captions: try --bank whiten with a smaller bank.rank, or a larger --batch-size",
    "backward": "the model's backward pass: try --amp, --compile on, a larger --batch-size or a smaller preset",
    "optimizer": "the optimizer costs the same whatever the batch: try a larger --batch-size",
    "evaluation": "ranking the held-out pairs: try a smaller --val-fraction in `shard`, or more training pairs per epoch",
    "checkpoint": "saving: try a larger train.save_minutes, or a run folder on a faster disk",
    "telemetry": "measuring: this is a bug of ours, please report it",
    "other": "the program between the steps: this is a bug of ours, please report it",
}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What limits the speed."""

    phase: Phase
    share: float
    advice: str


def find_bottleneck(shares: Mapping[Phase, float]) -> Bottleneck | None:
    """The bottleneck by shares of the time; None if nothing was measured."""
    if not shares:
        return None
    excess = {phase: shares.get(phase, 0.0) - tolerable for phase, tolerable in TOLERABLE.items()}
    worst = max(excess, key=lambda phase: excess[phase])
    if excess[worst] <= 0.0:
        worst = max(("forward", "backward"), key=lambda phase: shares.get(phase, 0.0))
    return Bottleneck(worst, shares.get(worst, 0.0), ADVICE[worst])
