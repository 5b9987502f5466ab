"""What every image encoder offers: features of known width for the head, and pictures of where it looked, if it looks.

An encoder takes the stacked picture [B, 3, H, T*W] that loaders yield. How many tiles that is, and how large, is told at
construction; nothing here assumes two tiles or 32 pixels.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.errors import ConfigError


class ImageEncoder(nn.Module):
    """Base of the encoders; `feature_width` is the width of what `forward` returns, `layers` the number of attention maps."""

    feature_width: int

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Features of the stacked pictures."""
        raise NotImplementedError

    def attention_maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers heads tokens tokens"] | None:  # noqa: ARG002
        """Attention weights of every block over all tokens of the picture; None for encoders without attention."""
        return None

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"] | None:  # noqa: ARG002
        """Head-averaged attention that each patch of the stacked picture receives in the pooled feature; None without attention."""
        return None


def split_tiles(images: Float[Tensor, "batch channels height width"], *, tiles: int) -> Float[Tensor, "folded channels height tile_width"]:
    """Tiles folded into the batch, in picture order: row `i * tiles + t` is tile `t` of picture `i`."""
    return rearrange(images, "b c h (t w) -> (b t) c h w", t=tiles)


def join_tiles(features: Float[Tensor, "folded width"], *, tiles: int) -> Float[Tensor, "batch joined"]:
    """Inverse fold for features: those of a picture's tiles side by side."""
    return rearrange(features, "(b t) d -> b (t d)", t=tiles)


def patch_grid(size: tuple[int, int], *, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in a picture of `size` (height, width) pixels.

    Raises:
        ConfigError: the patches do not cover the picture exactly.
    """
    if size[0] % patch_size or size[1] % patch_size:
        raise ConfigError(
            "patches do not cover the picture", where="model.patch_size", expected=f"a divisor of {size[0]} and {size[1]}", got=patch_size
        )
    return size[0] // patch_size, size[1] // patch_size
