"""A transformer trunk shared by the tiles: each tile is encoded alone, and the head sees their features side by side.

Which photo is on the left is then known by position, not learned; one trunk sees twice the photos per step, and attention
never mixes tiles. The convolutional stem (Xiao et al. 2021) gives a small transformer the locality it cannot learn from
50,000 photos; here it is the beginning of the convolutional encoder, normalised picture by picture.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.config import TileViTConfig
from pairclip_fast.models.blocks import Block, initialise
from pairclip_fast.models.channel_norm import ChannelNorm
from pairclip_fast.models.encoder import ImageEncoder, join_tiles, patch_grid, split_tiles
from pairclip_fast.models.stages import Halving, Stage
from pairclip_fast.models.vit import POSITION_STD
from pairclip_fast.models.whitening import FILTERS, WhitenedStem


class ConvStem(nn.Module):
    """Whitened 2x2 patches, then stages that halve the tile until one pixel is one token, doubling the channels on the way."""

    def __init__(self, *, stem_width: int, width: int, patch_size: int) -> None:
        super().__init__()
        levels = patch_size.bit_length() - 1
        *inner, last = itertools.pairwise([FILTERS, *(stem_width << level for level in range(levels - 1)), width])
        self.whitening = WhitenedStem(nn.SiLU())
        self.stages = nn.Sequential(
            *(Stage(*widths, activation="silu", norm=ChannelNorm) for widths in inner), Halving(*last, activation="silu", norm=ChannelNorm)
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, tiles: Float[Tensor, "folded 3 height width"]) -> Float[Tensor, "folded tokens embedding"]:
        framed = F.pad(tiles, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)  # 2x2 patches for every pixel
        tokens: Tensor = rearrange(self.stages(self.whitening(framed)), "n c h w -> n (h w) c")
        return tokens


class PatchStem(nn.Module):
    """Plain patch embedding: one linear map per patch."""

    def __init__(self, *, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(3 * patch_size**2, width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, tiles: Float[Tensor, "folded 3 height width"]) -> Float[Tensor, "folded tokens embedding"]:
        patches = rearrange(tiles, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        tokens: Tensor = self.project(patches)
        return tokens


class TileViT(ImageEncoder):
    """Pre-norm GELU transformer per tile with mean pooling.

    Args:
        config: Sizes.
        tiles: Tiles side by side in a picture.
        tile_size: Height and width of a tile, in pixels.
    """

    def __init__(self, config: TileViTConfig, *, tiles: int, tile_size: tuple[int, int]) -> None:
        super().__init__()
        self.tiles, self.feature_width = tiles, tiles * config.width
        self.grid = patch_grid(tile_size, patch_size=config.patch_size)
        self.stem: ConvStem | PatchStem = (
            ConvStem(stem_width=config.stem_width, width=config.width, patch_size=config.patch_size)
            if config.stem_width
            else PatchStem(width=config.width, patch_size=config.patch_size)
        )
        self.positions = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, heads=config.heads, mlp_width=config.mlp_width, activation="gelu", pre_norm=True)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        initialise(self)
        nn.init.normal_(self.positions, std=POSITION_STD)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        tokens = self.run_blocks(self.blocks, self._embed(images))
        return join_tiles(self.norm(tokens).mean(dim=1), tiles=self.tiles)

    def prepare(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Give a convolutional stem the whitening of these pictures."""
        if isinstance(self.stem, ConvStem):
            self.stem.whitening.fit(split_tiles(images, tiles=self.tiles))

    def attention_maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers heads tokens tokens"]:
        """Weights of every block, tokens tile by tile; zero between tiles, which do not see each other."""
        per_tile = rearrange(self._tile_maps(images), "(b t) l h q k -> b t l h q k", t=self.tiles)
        batch, tiles, layers, heads, tokens, _ = per_tile.shape
        maps = per_tile.new_zeros(batch, layers, heads, tiles * tokens, tiles * tokens)
        for tile in range(tiles):
            part = slice(tile * tokens, (tile + 1) * tokens)
            maps[..., part, part] = per_tile[:, tile]
        return maps

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"]:
        """What the mean-pooled tokens of each tile attend to, averaged over heads and queries, tiles side by side."""
        received = self._tile_maps(images).mean(dim=(2, 3))
        return rearrange(received, "(b t) l (r c) -> b l r (t c)", t=self.tiles, r=self.grid[0])

    def _tile_maps(self, images: Tensor) -> Tensor:
        tokens, maps = self._embed(images), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attention_map(tokens))
            tokens = block(tokens)
        return torch.stack(maps, dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        tokens = self.run(self.stem, split_tiles(images, tiles=self.tiles))
        return tokens + self.positions
