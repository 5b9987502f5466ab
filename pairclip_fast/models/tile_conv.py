"""A small residual convolutional net shared by the tiles, for much accuracy from few FLOPs at 32 pixels.

Stem, then three stages, each: halve by max pooling, widen, one residual convolution (the shape of the fast CIFAR nets, e.g.
ResNet-9 of Coleman et al. 2019), then a global maximum. Batch statistics are per process: with several processes a step
is not equal to one process with the whole batch (use a transformer where that matters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.config import TileConvConfig
from pairclip_fast.errors import ConfigError
from pairclip_fast.models.blocks import ACTIVATIONS, Activation
from pairclip_fast.models.encoder import ImageEncoder, join_tiles, split_tiles

STAGES = 3


class ConvBlock(nn.Sequential):
    """3x3 convolution, batch normalisation, activation."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), ACTIVATIONS[activation]())


class Stage(nn.Module):
    """Half the size, twice the channels, one residual block."""

    def __init__(self, channels: int, *, activation: Activation) -> None:
        super().__init__()
        self.widen = ConvBlock(channels, 2 * channels, activation=activation)
        self.residual = ConvBlock(2 * channels, 2 * channels, activation=activation)

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded wider half_height half_width"]:
        pixels = self.widen(F.max_pool2d(pixels, 2))
        result: Tensor = pixels + self.residual(pixels)
        return result


class TileConv(ImageEncoder):
    """Residual convolutional trunk per tile with global max pooling.

    Args:
        config: Sizes.
        tiles: Tiles side by side in a picture.
        tile_size: Height and width of a tile, in pixels; at least 8.
    """

    def __init__(self, config: TileConvConfig, *, tiles: int, tile_size: tuple[int, int]) -> None:
        super().__init__()
        if min(tile_size) < 2**STAGES:
            raise ConfigError("the tile is too small for three halvings", where="tile size", expected=f"{2**STAGES} or more", got=tile_size)
        self.tiles, self.feature_width = tiles, tiles * (config.width << STAGES)
        self.stem = ConvBlock(3, config.width, activation=config.activation)
        self.stages = nn.Sequential(*(Stage(config.width << level, activation=config.activation) for level in range(STAGES)))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        tiles = split_tiles(images, tiles=self.tiles).contiguous(memory_format=torch.channels_last)
        pixels = self.run(self.stem, tiles)
        for stage in self.stages:
            pixels = self.run(stage, pixels)
        return join_tiles(F.adaptive_max_pool2d(pixels, 1).flatten(1), tiles=self.tiles)
