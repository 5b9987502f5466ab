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
from pairclip_fast.data.shards import ShardReader


@runtime_checkable
class Executor(Protocol):
    """A backend. It is used by one thread at a time."""

    name: str
    bytes_read: int
    """Payload bytes taken from the shards so far."""

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        """Rows of augmented, normalised tiles side by side, on the loader's device; the memory is the caller's from then on.

        At most the loader's batch size of rows; the parameters are as in `parameters.Column`.

        Raises:
            DataError: a sample cannot be decoded; names its shard and key.
        """

    def close(self) -> None:
        """Give threads and files back. Safe to call twice."""


@runtime_checkable
class DrawingExecutor(Executor, Protocol):
    """A backend that computes the parameters itself, beside the pixels; they equal the table."""

    def fill_drawn(self, draw: Draw) -> Float32[Tensor, "batch 3 height width"]:
        """As `fill` with `draw.sources` and `draw.table()`."""


def sample_location(reader: ShardReader, sample_id: int) -> str:
    """Shard and key of a sample, for messages."""
    shard = int(np.searchsorted(reader.shard_starts, sample_id, side="right")) - 1
    return f"{reader.shard_paths[shard]}: {sample_id:09d}"
