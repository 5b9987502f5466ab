"""From a model configuration to the image tower: encoder, linear head, unit-length features.

The head maps to the caption bank's dimension, so the same encoder serves any text encoder. `logit_scale` belongs to the
loss, not to the model.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.config import ModelConfig, TileConvConfig, TileViTConfig, ViTConfig
from pairclip_fast.models.encoder import ImageEncoder
from pairclip_fast.models.tile_conv import TileConv
from pairclip_fast.models.tile_vit import TileViT
from pairclip_fast.models.vit import ViT


class PairEncoder(nn.Module):
    """Image tower: stacked picture to a point on the unit sphere of the caption bank.

    Args:
        encoder: Features of the stacked picture.
        dim: Dimension of the caption bank.
    """

    def __init__(self, encoder: ImageEncoder, *, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_width, dim)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """L2-normalised image features, float32 under any autocast (float64 for a float64 model)."""
        projected: Tensor = self.head(self.encoder(images))
        if projected.dtype.itemsize < 4:
            projected = projected.float()
        return F.normalize(projected, dim=-1)

    def attention_maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers heads tokens tokens"] | None:
        """Attention weights per block and head; None for convolutional encoders."""
        return self.encoder.attention_maps(images)

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"] | None:
        """Head-averaged attention on the token grid of the stacked picture; None for convolutional encoders."""
        return self.encoder.attention_pictures(images)


def build_model(config: ModelConfig, *, tiles: int, tile_size: tuple[int, int], dim: int) -> PairEncoder:
    """The image tower of a configuration, initialised from torch's global generator.

    Args:
        config: Architecture and sizes.
        tiles: Tiles side by side in a picture.
        tile_size: Height and width of a tile, in pixels.
        dim: Dimension of the caption bank.

    Raises:
        ConfigError: the patches do not cover the picture, or the tiles are too small.
    """
    encoder: ImageEncoder
    if isinstance(config, ViTConfig):
        encoder = ViT(config, image_size=(tile_size[0], tiles * tile_size[1]))
    elif isinstance(config, TileViTConfig):
        encoder = TileViT(config, tiles=tiles, tile_size=tile_size)
    else:
        assert isinstance(config, TileConvConfig)
        encoder = TileConv(config, tiles=tiles, tile_size=tile_size)
    return PairEncoder(encoder, dim=dim)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
