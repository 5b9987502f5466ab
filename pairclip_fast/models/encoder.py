"""What every image encoder offers: features of known width for the head, and pictures of where it looked, if it looks.

An encoder takes the stacked picture [B, 3, H, T*W] that loaders yield. How many tiles that is, and how large, is told at
construction; nothing here assumes two tiles or 32 pixels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pairclip_fast.errors import ConfigError
from pairclip_fast.models import tower


class ImageEncoder(nn.Module):
    """Base of the encoders; `feature_width` is the width of what `forward` returns, `layers` the number of attention maps."""

    feature_width: int
    recompute = False
    """Drop the blocks' activations and compute them again in the backward pass: less memory for a second forward pass. The same
    gradients bit for bit, but transformer blocks that C++ would have trained are torch's then, which round differently."""

    def run(self, part: nn.Module, inputs: Tensor) -> Tensor:
        """`part(inputs)`, recomputed later if so set. Nothing in our encoders draws random numbers."""
        if not (self.recompute and torch.is_grad_enabled()):
            result: Tensor = part(inputs)
            return result
        contexts: dict[str, Any] = {"context_fn": functools.partial(_second_pass, part)} if _batch_norms(part) else {}
        again: Tensor = checkpoint(part, inputs, use_reentrant=False, preserve_rng_state=False, **contexts)
        return again

    def run_blocks(
        self, blocks: nn.ModuleList, tokens: Float[Tensor, "folded tokens embedding"]
    ) -> Float[Tensor, "folded tokens embedding"]:
        """The tokens after all transformer blocks: as one function where that is covered, else block by block."""
        if not self.recompute and tower.takes(blocks, tokens):
            return tower.run(blocks, tokens)
        for block in blocks:
            tokens = self.run(block, tokens)
        return tokens

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Features of the stacked pictures."""
        raise NotImplementedError

    def prepare(self, images: Float[Tensor, "batch 3 height width"]) -> None:  # noqa: ARG002
        """Set what is computed from pictures of the training set instead of trained. Called once, before training."""
        return

    def attention_maps(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers heads tokens tokens"] | None:  # noqa: ARG002
        """Attention weights of every block over all tokens of the picture; None for encoders without attention."""
        return None

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"] | None:  # noqa: ARG002
        """Head-averaged attention that each patch of the stacked picture receives in the pooled feature; None without attention."""
        return None


def recomputes_batch_norm(module: nn.Module) -> bool:
    """Whether some encoder within drops activations of batch norms and computes them again."""
    return any(isinstance(part, ImageEncoder) and part.recompute and _batch_norms(part) for part in module.modules())


def _batch_norms(part: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]


def _second_pass(part: nn.Module) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of the two forward passes: the second one must not move the running statistics once more."""
    return contextlib.nullcontext(), _fixed_statistics(part)


@contextlib.contextmanager
def _fixed_statistics(part: nn.Module) -> Iterator[None]:
    """Inside, the norms move copies of their statistics."""
    norms = _batch_norms(part)
    originals = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, originals, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


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
