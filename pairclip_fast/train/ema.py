"""Averaged weights: a second copy of the model that follows the trained one, used for evaluation.

Averaging costs one pass over the weights per step and is worth a little accuracy at the end of a short schedule.
Buffers (batch-norm statistics) are copied, not averaged: they are averages already.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copy_module(module: Module) -> Module:
    """A copy with weights and buffers of its own that shares the constants: tensors that are plain attributes (the caption bank)."""
    constants = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(constant): constant for constant in constants})


class Ema:
    """Exponential moving average of a module's parameters.

    The decay grows as `min(decay, (1 + t) / (10 + t))`, as in TensorFlow's `ExponentialMovingAverage(num_updates=t)`:
    the random start is forgotten within the first steps even with a decay close to 1.

    Args:
        module: The trained module.
        decay: Limit of the decay per step, in (0, 1).
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module = copy_module(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), [p.detach() for p in module.parameters()], weight=1.0 - decay)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
