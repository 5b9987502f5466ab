"""What happens to samples whose records cannot be used: stop, leave them out, or take the next good one.

Whatever the policy, every batch keeps its shape and every rank its number of batches, and each bad record is told once, with
shard, offset, key and reason. A few bad records are an accident; more than 0.1 % of the split are a broken disk, and stop the
run under every policy.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.data.manifest import REBUILD
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import DataError
from pairclip_fast.events import Event, EventLog

Policy = Literal["raise", "skip", "substitute"]
BAD_SHARE = 0.001
"""Most records of a split that may be bad; at least one."""
Ints = NDArray[np.int64]


def bad_record_in_words(event: Event) -> str:
    """A `bad_record` event for the console."""
    return "bad record {shard}, byte {offset:,}, {key}: {reason}; policy: {policy}".format_map(event)


class BadRecords:
    """The bad records met so far, and what stands in for them.

    Args:
        reader: The split.
        policy: `raise`: the first one ends the loading; `skip`: rows that need it are zero and not valid; `substitute`: pixels
            and caption of the next good sample.
        events: Told of each.
    """

    def __init__(self, reader: ShardReader, *, policy: Policy, events: EventLog) -> None:
        self._reader, self._policy, self._events = reader, policy, events
        self._bad: set[int] = set()
        self.caption_ids: Ints = reader.caption_ids.copy()
        """int64 [N]: the captions of the split, those of substitutes in the places of bad records."""

    def __len__(self) -> int:
        return len(self._bad)

    def met(self, error: BadRecordError) -> None:
        """Take in a record that a backend could not use; the batch is then to be made again.

        Raises:
            BadRecordError: the policy is to stop.
            DataError: there are too many.
        """
        if self._policy == "raise" or error.sample_id in self._bad:
            raise error
        shard, key = str(error.where).rsplit(": ", 1)
        offset, reason = int(self._reader.records.offsets[error.sample_id]), f"{error.what} (expected {error.expected}, got {error.got})"
        event = {"shard": shard, "offset": offset, "key": key, "reason": reason, "policy": self._policy}
        self._events.emit("bad_record", **event)
        self._events.say(bad_record_in_words(event))
        self._add([error.sample_id])

    def replaced(self, sources: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Sources without bad records, and which rows [batch] had some and are to be left out."""
        tiles = self._reader.manifest.tiles
        skipped = np.zeros(len(sources), dtype=np.bool_)
        if not self._bad:
            return sources, skipped
        samples = sources // tiles
        bad: NDArray[np.bool_] = np.isin(samples, list(self._bad))
        if not bad.any():
            return sources, skipped
        if self._policy == "skip":
            skipped = np.asarray(bad.any(axis=1))
        good = np.array([self._good(sample) for sample in samples.ravel().tolist()], dtype=np.int64).reshape(samples.shape)
        return good * tiles + sources % tiles, skipped

    def state(self) -> str:
        """The ids, for a loader's state."""
        return " ".join(map(str, sorted(self._bad)))

    def restore(self, state: str) -> None:
        """Know the bad records of an earlier run.

        Raises:
            DataError: the state is damaged, or there are too many.
        """
        try:
            ids = [int(word) for word in state.split()]
        except ValueError:
            ids = [-1]
        if not all(0 <= sample_id < len(self._reader) for sample_id in ids):
            raise DataError("the loader state is damaged", where="bad", got=state)
        if self._policy != "raise":
            self._add(ids)

    def _add(self, ids: list[int]) -> None:
        self._bad |= set(ids)
        count, samples = len(self._bad), len(self._reader)
        most = max(1, int(BAD_SHARE * samples))
        if count > most or count == samples:  # without a good one, nothing could stand in
            expected = f"at most {most:,} of {samples:,}, and one that is good"
            raise DataError("too many bad records", where=self._reader.split, expected=expected, got=count, fix=REBUILD)
        if self._policy == "substitute":
            for sample_id in self._bad:
                self.caption_ids[sample_id] = self._reader.caption_ids[self._good(sample_id)]

    def _good(self, sample_id: int) -> int:
        """The sample itself, or the next one that is not known to be bad."""
        while sample_id in self._bad:
            sample_id = (sample_id + 1) % len(self._reader)
        return sample_id
