"""What a loader counts, and the verdict that follows: does the training wait for data, and for which part of the work?"""

from __future__ import annotations

import dataclasses

STARVED_SHARE = 0.05
"""Share of the time spent waiting for data from which a training counts as starved."""
BUSY_SHARE = 0.5
"""CPU time per second of filling from which the loader's own work, not the storage or other programs, is what takes long."""


@dataclasses.dataclass(kw_only=True, slots=True)
class LoaderStats:
    """Sums since the loader was made."""

    batches: int = 0
    """Delivered."""
    samples: int = 0
    """Delivered, without padding."""
    wait_s: float = 0.0
    """The consumer waited for a batch."""
    ready: int = 0
    """Batches that were ready, summed over the moments at which one was asked for."""
    fill_s: float = 0.0
    """Batches were made, on the clock."""
    fill_cpu_s: float = 0.0
    """CPU time of that: of the thread that makes them, and of the backend's own threads where they are counted."""
    bytes_read: int = 0
    """Payload taken from the shards."""
    bad_records: int = 0
    """Samples that were left out or replaced, each counted once."""

    def copy(self) -> LoaderStats:
        return dataclasses.replace(self)

    def since(self, before: LoaderStats) -> LoaderStats:
        """The counts of the time after `before`."""
        return LoaderStats(**{field.name: getattr(self, field.name) - getattr(before, field.name) for field in dataclasses.fields(self)})

    def to_json(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


def starvation(window: LoaderStats, *, seconds: float) -> str | None:
    """Why a training that took `seconds` waited for data; None if it hardly did.

    Args:
        window: The loader's counts of that time.
        seconds: Of the training, on the clock.
    """
    share = window.wait_s / seconds if seconds > 0 else 0.0
    if share < STARVED_SHARE or not window.batches:
        return None
    busy = window.fill_cpu_s / window.fill_s if window.fill_s > 0 else 0.0
    if busy >= BUSY_SHARE:
        cost = 1e6 * window.fill_cpu_s / max(window.samples, 1)
        cause = f"decoding and augmentation take {cost:.0f} us of CPU time per sample"
    else:
        others = "slow storage, or processors (or DALI's GPU) busy with something else"
        cause = f"the loader itself is idle {1.0 - busy:.0%} of its time: {others}"
    return f"the training waits for data {share:.0%} of the time: {cause}"
