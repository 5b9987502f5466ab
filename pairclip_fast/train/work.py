"""How much arithmetic a run has done after so many steps: steps with smaller tiles cost less."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RunWork:
    """The cost of a run's steps, phase by phase."""

    batch_size: int
    """Pairs per step, over all processes."""
    ends: tuple[int, ...]
    """For each phase, the step after its last."""
    flops_per_pair: tuple[float, ...]
    """For each phase: forward and backward pass, loss included."""

    def at(self, step: int) -> float:
        """FLOPs per pair of a step."""
        phase = sum(step >= end for end in self.ends[:-1])
        return self.flops_per_pair[phase]

    def until(self, step: int) -> float:
        """FLOPs of all steps before `step`."""
        total, begin = 0.0, 0
        for end, flops in zip(self.ends, self.flops_per_pair, strict=True):
            total += (min(step, end) - min(step, begin)) * flops
            begin = end
        return total * self.batch_size

    @property
    def mean(self) -> float:
        """FLOPs per pair over the whole run."""
        return self.until(self.ends[-1]) / (self.ends[-1] * self.batch_size)
