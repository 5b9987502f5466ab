"""What a loader backend has to do: turn sources and a parameter table into pictures. Order, randomness, pairing, mixing,
prefetch, state and statistics are the loader's, so they cannot differ between backends.

A source is a tile of the split: `sample_id * tiles + tile`. Pairs that are drawn anew, tiles that changed places and
partners of mixtures are just other sources; a backend knows nothing of them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from pairclip_fast.data.parameters import Draw


@runtime_checkable
class Executor(Protocol):
    """A backend. It is used by one thread at a time."""

    name: str

    @property
    def bytes_read(self) -> int:
        """Payload bytes taken from the shards so far."""

    @property
    def helper_cpu_s(self) -> float:
        """CPU seconds so far of the backend's own threads, where it can tell; the thread that calls `fill` is not among them."""

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        """Rows of augmented, normalised tiles side by side, on the loader's device; the memory is the caller's from then on.

        At most the loader's batch size of rows; the parameters are as in `parameters.Column`.

        Raises:
            BadRecordError: a record has changed or cannot be decoded; names it. The backend stays usable.
        """

    def close(self) -> None:
        """Give threads and files back. Safe to call twice."""


@runtime_checkable
class DrawingExecutor(Executor, Protocol):
    """A backend that computes the parameters itself, beside the pixels; they equal the table."""

    def fill_drawn(self, draw: Draw) -> Float32[Tensor, "batch 3 height width"]:
        """As `fill` with `draw.sources` and `draw.table()`."""
