"""Which tiles a sample consists of in an epoch, and what its caption then is: a pure function of (seed, epoch, sample).

As sharded, a sample is its own tiles. Two options make more pairs out of the same photos, at no cost to a backend:
resampled pairing gives every left photo a right one from another sample, new in each epoch and each exactly once (a keyed
permutation of the split); swapping exchanges the sides. The caption follows the photos, so neither makes a label wrong.
Both need captions that are told by the classes of the tiles alone: caption id = the classes as digits of a number.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.parameters import own_tiles
from pairclip_fast.data.philox import philox4x32, seed_key, unit_interval
from pairclip_fast.data.plan import Stream, counters, keyed_permutation
from pairclip_fast.errors import ConfigError

Ints = NDArray[np.int64]


class Composition:
    """The tiles and captions of samples.

    Args:
        caption_ids: int64 [N], captions of the samples as they were sharded.
        tiles: Tiles per sample.
        num_classes: Classes that a tile can have.
        num_captions: Captions of the bank.
        seed: Key, in 0..2**63-1.
        augment: Pairing and swapping; None for neither.

    Raises:
        ConfigError: tiles shall move, and the captions are not one per combination of classes.
    """

    def __init__(
        self, caption_ids: Ints, *, tiles: int, num_classes: int, num_captions: int, seed: int, augment: AugmentConfig | None
    ) -> None:
        self._caption_ids, self._tiles, self._num_classes, self._seed = caption_ids, tiles, num_classes, seed
        augment = augment or AugmentConfig()
        self._resamples, self._swap_probability = augment.pairing == "resampled", augment.swap_probability
        self._moves = self._resamples or self._swap_probability > 0.0
        if self._moves and num_captions != num_classes**tiles:
            raise ConfigError(
                "tiles can be paired anew or swapped only where the caption says no more than their classes",
                where="augment.pairing, augment.swap_probability",
                expected=f"one caption per combination: {num_classes} classes ^ {tiles} tiles",
                got=f"{num_captions:,} captions",
                fix="use pairing = 'fixed' and swap_probability = 0 with these data",
            )

    def of(self, ids: Ints, *, epoch: int) -> tuple[Ints, Ints]:
        """Sources int64 [batch, tiles] (`sample * tiles + tile`) and caption ids int64 [batch] of samples in `epoch`."""
        if not self._moves:
            return own_tiles(ids, tiles=self._tiles), self._caption_ids[ids]
        owners = np.repeat(ids[:, None], self._tiles, axis=1)
        if self._resamples:
            for tile in range(1, self._tiles):
                owners[:, tile] = _partners(len(self._caption_ids), self._seed, epoch, tile)[ids]
        sources = owners * self._tiles + np.arange(self._tiles)
        places = self._num_classes ** np.arange(self._tiles - 1, -1, -1)
        classes = self._caption_ids[owners] // places % self._num_classes
        swapped = self._swapped(ids, epoch=epoch)
        sources[swapped], classes[swapped] = sources[swapped, ::-1], classes[swapped, ::-1]
        return sources, (classes * places).sum(axis=1)

    def _swapped(self, ids: Ints, *, epoch: int) -> NDArray[np.bool_]:
        """Which samples show their tiles in reverse order."""
        words = philox4x32(counters(epoch, ids, tile=0, stream=Stream.SWAP), key=seed_key(self._seed))
        return unit_interval(words[:, 0]) < self._swap_probability


@functools.lru_cache(maxsize=4)
def _partners(num_samples: int, seed: int, epoch: int, tile: int) -> Ints:
    """For each sample the one that lends it its photo at `tile`."""
    return keyed_permutation(num_samples, seed=seed, epoch=epoch, tile=tile, stream=Stream.PAIRING)
