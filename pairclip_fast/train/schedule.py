"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from pairclip_fast.config import OptimizerConfig


def learning_rate(step: int, *, config: OptimizerConfig, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`.

    Linear warm-up over the first `w = warmup_epochs * steps_per_epoch` steps, `lr * (step + 1) / w`, so that the first
    step already learns; then from `lr` to `final_lr`, which the last step has, along half a cosine (Loshchilov and
    Hutter 2017, equation 5, without restarts) or a line; or constant.

    Args:
        step: Optimizer step, from 0.
        config: Peak, end, schedule and warm-up.
        steps_per_epoch: Steps of one epoch.
        total_steps: Steps of the whole run.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    fraction = min((step - warmup) / max(total_steps - warmup - 1, 1), 1.0)
    kept = 0.5 * (1.0 + math.cos(math.pi * fraction)) if config.schedule == "cosine" else 1.0 - fraction
    return config.final_lr + (config.lr - config.final_lr) * kept
