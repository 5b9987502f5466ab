"""Progressive resizing: small tiles first, full ones last, as a pure function of the step.

A convolution's cost falls with the area, so at 20 of 32 pixels a step costs about a third; what it learns carries over,
since filters do not know the size of a picture. Pictures are resized where the model trains, after augmentation.

Source: J. Howard, fast.ai's entry to DAWNBench (2018).
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive steps with tiles of one size."""

    end: int
    """The step after the last."""
    height: int
    width: int


def phases(progressive: tuple[tuple[int, float], ...], *, total_steps: int, tile_size: tuple[int, int]) -> tuple[Phase, ...]:
    """The steps of a run by the size of their tiles; phases that round to no step are left out.

    Args:
        progressive: Sides in pixels with their shares of the steps; of tiles that are not square, the heights.
        total_steps: Steps of the whole run.
        tile_size: Height and width of a tile in the data, which is also the size without `progressive`.
    """
    height, width = tile_size
    if not progressive:
        return (Phase(total_steps, height, width),)
    ends = [round(total_steps * share) for share in itertools.accumulate(share for _, share in progressive)]
    sizes = [(size, round(size * width / height)) for size, _ in progressive]
    begins = [0, *ends]
    return tuple(Phase(end, *size) for begin, end, size in zip(begins, ends, sizes, strict=False) if end > begin)


class Resizer:
    """Brings a batch to the size of its step.

    Args:
        phases: In the order of the steps.
        tiles: Tiles side by side in a picture.
    """

    def __init__(self, phases: tuple[Phase, ...], *, tiles: int) -> None:
        self.phases, self.tiles = phases, tiles

    def size(self, step: int) -> tuple[int, int]:
        """Height and width of the tiles at a step."""
        phase = next((phase for phase in self.phases if step < phase.end), self.phases[-1])
        return (phase.height, phase.width)

    def __call__(self, images: Float[Tensor, "b 3 h w"], *, step: int) -> Float[Tensor, "b 3 rows columns"]:
        """Every tile resized alone, so that none bleeds into its neighbour (bilinear, antialiased)."""
        height, width = self.size(step)
        if (height, width) == (images.shape[2], images.shape[3] // self.tiles):
            return images
        tiles = rearrange(images, "b c h (t w) -> (b t) c h w", t=self.tiles)
        tiles = tiles.contiguous(memory_format=torch.channels_last)
        small = F.interpolate(tiles, size=(height, width), mode="bilinear", antialias=True)
        return rearrange(small, "(b t) c h w -> b c h (t w)", t=self.tiles)
