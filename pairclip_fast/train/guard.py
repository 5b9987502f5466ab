"""The finite-number guard: no update from a loss or gradient that is not finite, without a wait for the device.

The check runs on the device and its outcome goes to the fused optimizer as `found_inf`: the update is skipped there. It is
sticky: later updates are skipped as well, so the weights stay as they were before the bad step until the host looks.
With fp16 an overflow now and then is expected (the scaler lowers its scale); only a long streak of them is a failure.
"""

from __future__ import annotations

from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from pairclip_fast.data.loader import Batch
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.train.device import CUDA_GUARD_STEPS

FP16_STREAK = 20
"""Overflows in a row after which loss scaling has failed: 2^16 halved 20 times is below 1."""
IDS_SHOWN = 64


class FiniteGuard:
    """Watches loss and gradient norm.

    Args:
        device: Where they live.
        tolerance: Bad steps in a row that are still fine: 0, or `FP16_STREAK` with loss scaling.
    """

    def __init__(self, device: torch.device, *, tolerance: int = 0) -> None:
        self.tolerance = tolerance
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._tripped_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._values = torch.zeros(2, device=device)
        self._recent: deque[tuple[int, int, Tensor, Tensor]] = deque(maxlen=CUDA_GUARD_STEPS + 1)
        """Step, epoch, sample ids and caption ids of the steps since the last look."""

    def inspect(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], *, step: int, batch: Batch) -> Float[Tensor, ""]:
        """1 if the update of `step` must be skipped, else 0, as the optimizer's `found_inf` wants it."""
        self._recent.append((step, batch.epoch, batch.sample_ids, batch.caption_ids))
        values = torch.stack((loss.float(), grad_norm.float()))
        bad = ~torch.isfinite(values).all()
        self._streak = (self._streak + 1) * bad
        trips = (self._streak > self.tolerance) & (self._tripped_at < 0)
        self._values = torch.where(trips, values, self._values)
        self._tripped_at = torch.where(trips, step, self._tripped_at)
        return (bad | (self._tripped_at >= 0)).float()

    @property
    def tripped(self) -> bool:
        """Whether some step had a loss or gradient that is not finite; waits for the device."""
        return int(self._tripped_at) >= 0

    def check(self, *, events: EventLog) -> None:
        """Look at the outcome; waits for the device.

        Raises:
            NumericsError: some step since the last look had a loss or gradient that is not finite.
        """
        step = int(self._tripped_at)
        if step < 0:
            return
        loss, grad_norm = self._values.tolist()
        samples: list[int] = []
        for number, epoch, sample_ids, caption_ids in self._recent:
            if number == step:
                samples, captions = sample_ids.tolist(), caption_ids.tolist()
                words = {"loss": str(loss), "grad_norm": str(grad_norm)}  # as text: JSON has no NaN
                events.emit("numerics", step=step, epoch=epoch, sample_ids=samples, caption_ids=captions, **words)
        raise NumericsError(
            "loss or gradient is not finite; the update was not made",
            where=f"step {step}",
            expected="finite numbers",
            got=f"loss {loss}, gradient norm {grad_norm}, samples {samples[:IDS_SHOWN]}",
            fix="the last checkpoint is untouched: look at these samples, or start a new run with a lower --lr (with muon also a lower"
            " optimizer.muon_lr, in a --config file) or without --amp",
        )
