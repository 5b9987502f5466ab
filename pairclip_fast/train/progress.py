"""Where a run stands: the few numbers that, with the tensors, are the whole state of a training."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from pairclip_fast.errors import CheckpointError


@dataclasses.dataclass(kw_only=True)
class Best:
    """The best evaluation so far."""

    step: int
    epoch: int
    """From 0, as in the events."""
    checkpoint: str
    """Name of the checkpoint that holds these weights."""
    metrics: dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Counters of a run over all its attempts."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs finished, evaluation included."""
    samples_seen: int = 0
    """Pairs trained on, over all processes."""
    seconds: float = 0.0
    """Time spent, waiting and evaluation included, interruptions not."""
    best: Best | None = None
    stale: int = 0
    """Evaluations since the best one."""
    finished: str | None = None
    """Why the run ended (`epochs`, `early_stop`), or None."""

    def take_in(self, metrics: dict[str, Any], *, checkpoint: str) -> bool:
        """Count an evaluation; True if it is the best so far by held-out top-1 (the earlier of two equal ones stays)."""
        if self.best is not None and metrics["top1"] <= self.best.metrics["top1"]:
            self.stale += 1
            return False
        self.best = Best(step=self.step, epoch=self.epoch - 1, checkpoint=checkpoint, metrics=metrics)
        self.stale = 0
        return True

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object, *, where: object) -> Progress:
        """Checked, since a checkpoint may come from anywhere.

        Raises:
            CheckpointError: a field is missing or of the wrong type.
        """
        try:
            return msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError("the checkpoint's state is malformed", where=where, got=error) from error
