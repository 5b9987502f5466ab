"""A small convolutional net shared by the tiles: the most accuracy from the fewest FLOPs at 32 pixels.

The shape of the CIFAR speedruns (K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024): a frozen stem that
whitens 2x2 patches, then three stages that each halve the picture right after their first convolution, and a global
maximum. Further convolutions in the last two stages, where pixels are few, have skip connections beside them; the others
need none. Nothing depends on the size of a tile, so a run may train on small ones first.

Batch statistics are per process: with several processes a step is not equal to one process with the whole batch (use a
transformer where that matters).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.config import LEAST_CONV_TILE, TileConvConfig
from pairclip_fast.errors import ConfigError
from pairclip_fast.models.blocks import ACTIVATIONS
from pairclip_fast.models.encoder import ImageEncoder, join_tiles, split_tiles
from pairclip_fast.models.stages import Residual, Stage
from pairclip_fast.models.whitening import FILTERS, WhitenedStem

STAGE_WIDTHS = (1, 4, 4)
"""Channels of the stages, in multiples of the configured width."""


class TileConv(ImageEncoder):
    """Convolutional trunk per tile with global max pooling.

    Args:
        config: Sizes.
        tiles: Tiles side by side in a picture.
        tile_size: Height and width of a tile, in pixels; at least 9, so that three halvings of what the stem leaves are possible.
    """

    def __init__(self, config: TileConvConfig, *, tiles: int, tile_size: tuple[int, int]) -> None:
        super().__init__()
        if min(tile_size) < LEAST_CONV_TILE:
            raise ConfigError(
                "the tile is too small for the stem and three halvings",
                where="tile size",
                expected=f"{LEAST_CONV_TILE} or more",
                got=tile_size,
            )
        widths = [FILTERS, *(multiple * config.width for multiple in STAGE_WIDTHS)]
        self.tiles, self.feature_width = tiles, tiles * widths[-1]
        self.stem = WhitenedStem(ACTIVATIONS[config.activation]())
        self.stages = nn.Sequential()
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            self.stages.append(Stage(inputs, outputs, activation=config.activation, norm=nn.BatchNorm2d))
            for _ in range(config.residuals if number else 0):
                self.stages.append(Residual(outputs, activation=config.activation, norm=nn.BatchNorm2d))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        tiles = split_tiles(images, tiles=self.tiles).contiguous(memory_format=torch.channels_last)
        pixels = self.run(self.stem, tiles)
        for stage in self.stages:
            pixels = self.run(stage, pixels)
        return join_tiles(F.adaptive_max_pool2d(pixels, 1).flatten(1), tiles=self.tiles)

    def prepare(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Give the stem the whitening of these pictures."""
        self.stem.fit(split_tiles(images, tiles=self.tiles))
