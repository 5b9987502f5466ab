"""What goes into a batch: plan, composition, parameters and mixing put together, before any pixel is touched.

Everything here is a pure function of the configuration and of (epoch, position); the loader hands it to a backend.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.composition import Composition
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.data.mixing import Mixture, draw_mixture
from pairclip_fast.data.parameters import Draw
from pairclip_fast.data.plan import Plan

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the batches of one split are made."""

    plan: Plan
    composition: Composition
    augment: AugmentConfig
    tile_size: tuple[int, int]

    @classmethod
    def of(cls, manifest: Manifest, caption_ids: Ints, *, plan: Plan, augment: AugmentConfig | None) -> Recipe:
        """The recipe for a split of a data folder.

        Raises:
            ConfigError: pairing or swapping with captions that do not allow it.
        """
        composition = Composition(
            caption_ids,
            tiles=manifest.tiles,
            num_classes=len(manifest.class_names),
            num_captions=manifest.num_captions,
            seed=plan.seed,
            augment=augment,
        )
        tile_size = (manifest.tile_height, manifest.tile_width)
        return cls(plan=plan, composition=composition, augment=augment or AugmentConfig(), tile_size=tile_size)

    def draw(self, ids: Ints, *, epoch: int, partner: bool = False) -> tuple[Draw, Ints]:
        """The tiles of samples in `epoch`, or of samples blended into others as their partners; and their caption ids."""
        sources, caption_ids = self.composition.of(ids, epoch=epoch)
        draw = Draw(
            ids=ids,
            sources=sources,
            tile_size=self.tile_size,
            seed=self.plan.seed,
            epoch=epoch,
            augment=self.augment,
            partner=partner,
        )
        return draw, caption_ids

    def mixture(self, ids: Ints, *, epoch: int) -> Mixture:
        """How samples are mixed with their partners in `epoch`."""
        return draw_mixture(ids, tile_size=self.tile_size, seed=self.plan.seed, epoch=epoch, augment=self.augment)
