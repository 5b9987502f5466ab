"""One vision transformer over the patches of all tiles together: the architecture of the report this project grew from.

Patch embedding without bias, CLS token, learned positions, blocks, final LayerNorm, CLS out (Dosovitskiy et al. 2021).
With the report's sizes it has 19,031,040 parameters (6 blocks) or 2,219,520 (1 block), without the projection head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.config import ViTConfig
from pairclip_fast.models.blocks import Block, initialise
from pairclip_fast.models.encoder import ImageEncoder, patch_grid

POSITION_STD = 0.02
"""Spread of the initial CLS token and positions (Dosovitskiy et al. 2021)."""


class ViT(ImageEncoder):
    """Transformer over the stacked picture.

    Args:
        config: Sizes.
        image_size: Height and width of the whole stacked picture, in pixels.
    """

    def __init__(self, config: ViTConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.feature_width, self.patch_size = config.width, config.patch_size
        self.grid = patch_grid(image_size, patch_size=config.patch_size)
        # A linear map over unfolded patches is the patch convolution, without a convolution's layout changes.
        self.patch = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.cls = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, heads=config.heads, mlp_width=config.mlp_width, activation=config.activation, pre_norm=config.pre_norm)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        initialise(self)
        nn.init.xavier_uniform_(self.patch.weight)
        nn.init.normal_(self.cls, std=POSITION_STD)
        nn.init.normal_(self.positions, std=POSITION_STD)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        tokens = self.run_blocks(self.blocks, self._embed(images))
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def attention_maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers heads tokens tokens"]:
        """Weights of every block; token 0 is CLS, the others are patches in reading order."""
        tokens, maps = self._embed(images), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attention_map(tokens))
            tokens = block(tokens)
        return torch.stack(maps, dim=1)

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"]:
        """What CLS attends to, averaged over heads."""
        received = self.attention_maps(images).mean(dim=2)[:, :, 0, 1:]
        return rearrange(received, "b l (r c) -> b l r c", r=self.grid[0])

    def _embed(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        tokens = self.patch(patches)
        return torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
