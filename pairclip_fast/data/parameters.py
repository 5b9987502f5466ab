"""What happens to each tile: the parameter table, a pure function of (seed, epoch, sample, tile).

The table is all that a backend needs to know of the augmentation, besides `AugmentConfig.border`. Its rows depend on
nothing but their own keys, so a picture is the same in every batch, on every rank and after any resume.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.philox import bounded, philox4x32, seed_key, unit_interval
from pairclip_fast.data.plan import Stream, counters
from pairclip_fast.native import native


class Column(IntEnum):
    """Columns of a parameter table."""

    ANGLE = 0
    """Degrees, counter-clockwise positive."""
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    FLIP = 4
    """1 for a horizontal flip, else 0."""
    SHIFT_X = 5
    """Whole pixels the picture moves to the right."""
    SHIFT_Y = 6
    """Whole pixels the picture moves down."""
    CUT_X = 7
    """First column, after the flip, of the square that is cut out; it may lie outside."""
    CUT_Y = 8
    """First row of that square."""
    CUT_SIZE = 9
    """Its side in pixels; 0 for none."""


PARTNER = 16
"""Added to the stream of a tile's parameters where its sample is blended into another one: it is augmented anew."""
RANGES = (
    "rotate_degrees",
    "brightness",
    "contrast",
    "saturation",
    "flip_probability",
    "shift_pixels",
    "cutout_size",
    "alternating_flip",
)
"""What of the configuration the table depends on."""


def identity_table(num_samples: int, *, tiles: int) -> NDArray[np.float32]:
    """The parameter table that changes nothing, float32 [num_samples, tiles, 10]."""
    table = np.zeros((num_samples, tiles, len(Column)), dtype=np.float32)
    table[..., [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1.0
    return table


def own_tiles(ids: NDArray[np.int64], *, tiles: int) -> NDArray[np.int64]:
    """Sources int64 [batch, tiles] of samples as they were sharded: `id * tiles + tile`."""
    return ids[:, None] * tiles + np.arange(tiles)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Tiles to augment, and everything that their parameters are a function of; see `parameter_table` for the fields."""

    ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    tile_size: tuple[int, int]
    seed: int
    epoch: int
    augment: AugmentConfig | None
    partner: bool = False

    def rows(self, chosen: NDArray[np.int64]) -> Draw:
        """Some of the samples."""
        return dataclasses.replace(self, ids=self.ids[chosen], sources=self.sources[chosen])

    def table(self) -> NDArray[np.float32]:
        """The parameters, float32 [batch, tiles, 10]."""
        return parameter_table(
            self.ids,
            self.sources,
            tile_size=self.tile_size,
            seed=self.seed,
            epoch=self.epoch,
            augment=self.augment,
            partner=self.partner,
        )


def parameter_table(
    ids: NDArray[np.int64],
    sources: NDArray[np.int64],
    *,
    tile_size: tuple[int, int],
    seed: int,
    epoch: int,
    augment: AugmentConfig | None,
    partner: bool = False,
) -> NDArray[np.float32]:
    """What happens to each tile of each sample in `epoch`.

    A value is `centre + range * (2 u - 1)` for the scaled columns, with u of 24 bits, evaluated in float64 and rounded once
    to float32; integer columns come from integer arithmetic. A row depends on nothing but the arguments for its own tile.

    Args:
        ids: int64 [batch], sample ids.
        sources: int64 [batch, tiles], the tiles shown; only `alternating_flip` looks at them: it follows the photo.
        tile_size: Height and width in pixels.
        seed: Key, in 0..2**63-1.
        epoch: Epoch number.
        augment: Ranges; None for the identity.
        partner: Parameters for where the sample is blended into another one.

    Returns:
        float32 [batch, tiles, 10], columns as in `Column`.
    """
    module = native().module
    if module is None or augment is None:
        return parameter_table_in_numpy(ids, sources, tile_size=tile_size, seed=seed, epoch=epoch, augment=augment, partner=partner)
    table = np.empty((*sources.shape, len(Column)), dtype=np.float32)
    ranges = {name: getattr(augment, name) for name in RANGES}
    height, width = tile_size
    module.parameter_table(
        ids, sources, table, seed=seed, epoch=epoch, stream_offset=PARTNER * partner, height=height, width=width, **ranges
    )
    return table


def parameter_table_in_numpy(
    ids: NDArray[np.int64],
    sources: NDArray[np.int64],
    *,
    tile_size: tuple[int, int],
    seed: int,
    epoch: int,
    augment: AugmentConfig | None,
    partner: bool = False,
) -> NDArray[np.float32]:
    """`parameter_table` without the C++ extension (thirty times slower), and its definition."""
    tiles = sources.shape[1]
    table = identity_table(len(ids), tiles=tiles)
    if augment is None:
        return table
    key = seed_key(seed)

    def draw(stream: Stream) -> NDArray[np.uint32]:
        words = counters(epoch, ids[:, None], tile=np.arange(tiles), stream=int(stream) + PARTNER * partner)
        return philox4x32(words, key=key)

    if changes_colour(augment) or augment.rotate_degrees:
        signed = 2.0 * unit_interval(draw(Stream.COLOUR)) - 1.0
        table[..., Column.ANGLE] = augment.rotate_degrees * signed[..., 0]
        table[..., Column.BRIGHTNESS] = 1.0 + augment.brightness * signed[..., 1]
        table[..., Column.CONTRAST] = 1.0 + augment.contrast * signed[..., 2]
        table[..., Column.SATURATION] = 1.0 + augment.saturation * signed[..., 3]
    if augment.flip_probability or augment.shift_pixels:
        words = draw(Stream.GEOMETRY)
        table[..., Column.FLIP] = unit_interval(words[..., 0]) < augment.flip_probability
        shifts = bounded(words[..., 1:3], count=2 * augment.shift_pixels + 1) - augment.shift_pixels
        table[..., Column.SHIFT_X], table[..., Column.SHIFT_Y] = shifts[..., 0], shifts[..., 1]
    if augment.alternating_flip:
        table[..., Column.FLIP] = alternating_flips(sources, seed=seed, epoch=epoch)
    if augment.cutout_size:
        words, (height, width) = draw(Stream.CUTOUT), tile_size
        table[..., Column.CUT_X] = bounded(words[..., 0], count=width) - augment.cutout_size // 2
        table[..., Column.CUT_Y] = bounded(words[..., 1], count=height) - augment.cutout_size // 2
        table[..., Column.CUT_SIZE] = augment.cutout_size
    return table


def alternating_flips(sources: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Whether each tile is flipped: in every other epoch, half of the tiles in the even ones.

    Two consecutive epochs then show every photo both ways, where coin flips repeat half of them (Jordan 2024, airbench).
    """
    tiles = sources.shape[1]
    words = philox4x32(counters(0, sources // tiles, tile=sources % tiles, stream=Stream.FLIP_PHASE), key=seed_key(seed))
    begins: NDArray[np.bool_] = words[..., 0] >= np.uint32(1 << 31)
    return begins ^ bool(epoch & 1)


def changes_colour(augment: AugmentConfig | None) -> bool:
    """Whether any colour operation is switched on."""
    return augment is not None and bool(augment.brightness or augment.contrast or augment.saturation)
