"""From the host's memory to a GPU, beside the training and not in its queue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Uploads:
    """Copies to a device, on a stream of their own; on a CPU there is nothing to copy.

    On the stream of the training a copy would begin when the steps queued before it are done, and one from memory that is not
    pinned would hold the host up until then.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, arrived; for use on its default stream."""
        if self._stream is None:
            return tensor
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return self.beside(lambda: pinned.to(self._device, non_blocking=True))

    def beside(self, copy: Callable[[], Tensor]) -> Tensor:
        """What `copy` makes on the device, finished; for use on its default stream."""
        if self._stream is None:
            return copy()
        with torch.cuda.stream(self._stream):
            there = copy()
        self._stream.synchronize()
        there.record_stream(torch.cuda.default_stream(self._device))  # its memory must not be used again before the training is done
        return there
