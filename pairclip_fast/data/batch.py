"""What the training sees of the data: a batch, and the loader that delivers batches and knows where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from pairclip_fast.data.stats import LoaderStats


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of one step, on the loader's device."""

    images: Float[Tensor, "batch 3 height width"]
    """Normalised, float32 unless the backend was asked for bfloat16; the tiles of a sample side by side."""
    caption_ids: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    """False for padding of a short last batch: leave such rows out of every sum."""
    epoch: int
    step: int
    """Step within the epoch."""
    partner_caption_ids: Int64[Tensor, " batch"] | None = None
    """Caption of the sample mixed into each one; None if nothing is mixed."""
    mix_weight: Float32[Tensor, " batch"] | None = None
    """Share of the own picture and caption, in [0, 1]; the rest is the partner's."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with `change` applied to each tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values)


@runtime_checkable
class Loader(Protocol):
    """Batches of one split."""

    @property
    def stats(self) -> LoaderStats: ...

    @property
    def backend(self) -> str:
        """Which backend fills the batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the position to the end of the epoch; then the position is the start of the next one."""

    def __len__(self) -> int:
        """Steps of a whole epoch."""

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last delivered batch, what it is a position in, and the bad records; under 300 bytes as JSON,
        but for the latter.
        """

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from `state`. Raises DataError if it belongs to other data or another order."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""

    def close(self) -> None:
        """Stop the thread, close the shards. Safe to call twice."""
