"""Which sample comes when: a pure function of (seed, epoch).

No backend owns randomness. The plan says the order, `composition` what a sample consists of and `parameters` what happens
to each of its tiles; backends only execute. Hence the stream is the same for every backend, batch size, world size and
prefetch depth, and the whole state of a loader is a position. The order of an epoch is decided globally: ranks read
slices of it, so it does not change with their number.

Counters of the Philox blocks are (epoch, sample id, tile, stream) under the key `seed`; the streams are below.
"""

from __future__ import annotations

import dataclasses
import functools
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.data.philox import philox4x32, seed_key
from pairclip_fast.errors import ConfigError
from pairclip_fast.native import native


class Stream(IntEnum):
    """Last word of the counter: what a Philox block is for."""

    ORDER = 0
    COLOUR = 1
    """Words: angle, brightness, contrast, saturation."""
    GEOMETRY = 2
    """Words: flip, shift x, shift y, unused."""
    CUTOUT = 3
    """Words: x, y of the square's centre."""
    FLIP_PHASE = 4
    """Words: whether a tile is flipped in even or odd epochs."""
    PAIRING = 5
    """Words: sort key of the permutation of a tile's images."""
    SWAP = 6
    """Words: whether the tiles of a sample change places."""
    MIX = 7
    """Words: whether, two for the weight, unused; then the box in MIX_BOX."""
    MIX_BOX = 8
    """Words: x, y of the box's centre."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The order of the samples over epochs, steps and ranks."""

    num_samples: int
    """Samples of the split; ids are 0..num_samples-1."""
    batch_size: int
    """Samples per step over all ranks."""
    seed: int
    """Key of the permutation, in 0..2**63-1."""
    world_size: int = 1
    """Number of ranks that share a step."""
    rank: int = 0
    """Which of them this is."""
    shuffle: bool = True
    """Permute each epoch; otherwise ids come ascending."""
    drop_last: bool = True
    """Leave out the samples that do not fill a last batch; otherwise that batch is padded with `valid` = False."""

    def __post_init__(self) -> None:
        _require(0 < self.num_samples < 2**32, "number of samples", "in 1..2**32-1", self.num_samples)
        _require(self.world_size >= 1 and 0 <= self.rank < self.world_size, "rank", f"in 0..{self.world_size - 1}", self.rank)
        _require(self.batch_size >= 1, "batch size", "1 or more", self.batch_size)
        _require(self.batch_size % self.world_size == 0, "batch size", f"a multiple of the {self.world_size} processes", self.batch_size)
        if self.drop_last:
            _require(
                self.batch_size <= self.num_samples, "batch size", f"at most the {self.num_samples:,} samples of the split", self.batch_size
            )

    @property
    def local_batch_size(self) -> int:
        """Samples per step of one rank."""
        return self.batch_size // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the same on every rank."""
        return self.steps_from(0)

    def steps_from(self, cursor: int) -> int:
        """Steps left in an epoch of which `cursor` samples (over all ranks) have been delivered."""
        left = max(self.num_samples - cursor, 0)
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """int64 [num_samples], read-only: the ids in the order of `epoch`, over all ranks."""
        return _order(self.num_samples, self.seed if self.shuffle else 0, epoch if self.shuffle else 0, self.shuffle)

    def ids_at(self, epoch: int, *, cursor: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids of this rank for the step that starts at global position `cursor`.

        Rows past the end of the epoch are padding: ids taken from its beginning, with `valid` = False. Every batch thus
        has the same shape and every rank the same number of batches.

        Returns:
            ids int64 [local_batch_size] and valid bool [local_batch_size].
        """
        first = cursor + self.rank * self.local_batch_size
        last = first + self.local_batch_size
        if last <= self.num_samples:  # all but the last step of an epoch: a slice, a third of the time
            return self.order(epoch)[first:last].copy(), np.ones(self.local_batch_size, dtype=np.bool_)
        positions = np.arange(first, last)
        return self.order(epoch)[positions % self.num_samples], positions < self.num_samples

    def partners_at(self, epoch: int, *, cursor: int) -> NDArray[np.int64]:
        """For each of `ids_at` the sample it is mixed with: the one half an epoch further on, so each is a partner once."""
        first = cursor + self.rank * self.local_batch_size
        positions = np.arange(first, first + self.local_batch_size) + self.num_samples // 2
        return self.order(epoch)[positions % self.num_samples]

    def valid_at(self, cursor: int) -> int:
        """Samples of this rank, without padding, in the step that starts at `cursor`."""
        first = cursor + self.rank * self.local_batch_size
        return min(max(self.num_samples - first, 0), self.local_batch_size)

    def step_ids(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Ids of this rank for `step`: global positions step * batch_size + rank * local_batch_size + i."""
        return self.ids_at(epoch, cursor=step * self.batch_size)[0]

    def step_valid(self, epoch: int, step: int) -> NDArray[np.bool_]:
        """Which of `step_ids` are samples of the epoch and not padding."""
        return self.ids_at(epoch, cursor=step * self.batch_size)[1]


@functools.lru_cache(maxsize=4)
def _order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:  # noqa: FBT001 - a cache key
    ids = np.arange(num_samples, dtype=np.int64)
    if shuffle:
        ids = keyed_permutation(num_samples, seed=seed, epoch=epoch, tile=0, stream=Stream.ORDER)
    ids.setflags(write=False)
    return ids


def keyed_permutation(count: int, *, seed: int, epoch: int, tile: int, stream: Stream) -> NDArray[np.int64]:
    """0..count-1 sorted by a 64-bit random key each: a permutation whatever the keys, ties (p < count^2 / 2^65) broken by number.

    In C++ where the extension is there: the same order, a tenth of the time.
    """
    module = native().module
    if module is not None:
        order = np.empty(count, dtype=np.int64)
        module.keyed_permutation(order, seed=seed, epoch=epoch, tile=tile, stream=int(stream))
        return order
    return keyed_permutation_in_numpy(count, seed=seed, epoch=epoch, tile=tile, stream=stream)


def keyed_permutation_in_numpy(count: int, *, seed: int, epoch: int, tile: int, stream: Stream) -> NDArray[np.int64]:
    """`keyed_permutation` without the C++ extension, and its definition."""
    words = philox4x32(counters(epoch, np.arange(count), tile=tile, stream=stream), key=seed_key(seed)).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


def counters(epoch: int, ids: NDArray[np.int64], *, tile: NDArray[np.int64] | int, stream: int) -> NDArray[np.uint32]:
    """Philox counters (epoch, id, tile, stream), uint32 [..., 4] over the broadcast of `ids` and `tile`."""
    shape = np.broadcast_shapes(np.shape(ids), np.shape(tile))
    block = np.empty((*shape, 4), dtype=np.uint32)
    block[..., 0], block[..., 1], block[..., 2], block[..., 3] = epoch, ids, tile, stream
    return block


def _require(condition: bool, name: str, expected: str, got: object) -> None:  # noqa: FBT001 - reads as an assertion
    if not condition:
        raise ConfigError("the loader cannot be set up", where=name, expected=expected, got=got)
