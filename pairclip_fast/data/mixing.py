"""Mixtures of two samples: MixUp (a weighted sum) and CutMix (a box of one in the other), the same for all tiles.

Weight and box are pure functions of (seed, epoch, sample). The picture of a mixture is made after normalisation, where
adding commutes with everything but the cutout; its target is `weight * own caption + (1 - weight) * partner's caption`.

Source: Zhang et al. 2018, "mixup: Beyond empirical risk minimization"; Yun et al. 2019, "CutMix".
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import box_mask
from pairclip_fast.data.philox import bounded, philox4x32, seed_key, unit_interval
from pairclip_fast.data.plan import Stream, counters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """How much of each sample stays, and where."""

    weight: NDArray[np.float32]
    """[batch], share of the own picture and caption; 1 where nothing is mixed."""
    box: NDArray[np.int64]
    """[batch, 4], CutMix: the pixels x0 <= x < x1, y0 <= y < y1 of every tile that show the partner, as x0, x1, y0, y1."""

    def rows(self, chosen: NDArray[np.int64]) -> Mixture:
        """That of some samples."""
        return Mixture(weight=self.weight[chosen], box=self.box[chosen])


def draw_mixture(ids: NDArray[np.int64], *, tile_size: tuple[int, int], seed: int, epoch: int, augment: AugmentConfig) -> Mixture:
    """Weights and boxes of samples in `epoch`.

    CutMix's box has the area `1 - lambda` of the tile around a uniform centre; what hangs over the edge is cut off, and
    the weight is the share of pixels that are left.
    """
    key, (height, width) = seed_key(seed), tile_size
    draws = unit_interval(philox4x32(counters(epoch, ids, tile=0, stream=Stream.MIX), key=key))
    share = symmetric_beta(draws[:, 1], draws[:, 2], alpha=augment.mix_alpha)
    mixed, box = draws[:, 0] < augment.mix_probability, np.zeros((len(ids), 4), dtype=np.int64)
    if augment.mix == "cutmix":
        words = philox4x32(counters(epoch, ids, tile=0, stream=Stream.MIX_BOX), key=key)
        for axis, side in enumerate((width, height)):
            extent = np.rint(side * np.sqrt(1.0 - share)).astype(np.int64)
            first = bounded(words[:, axis], count=side) - extent // 2
            box[:, 2 * axis], box[:, 2 * axis + 1] = first.clip(0, side), (first + extent).clip(0, side)
        share = 1.0 - (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)
    box[~mixed] = 0
    return Mixture(weight=np.where(mixed, share, 1.0).astype(np.float32), box=box)


def symmetric_beta(u: NDArray[np.float64], v: NDArray[np.float64], *, alpha: float) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from two uniforms in [0, 1), without rejection.

    Student's t with 2 alpha degrees of freedom by the polar method (Bailey 1994, Math. Comp. 62, 779-781), and
    `(1 + t / sqrt(2 alpha + t^2)) / 2`.
    """
    odds = (1.0 - u) ** (-1.0 / alpha) - 1.0
    cosine = np.cos(2.0 * np.pi * v)
    share: NDArray[np.float64] = 0.5 + 0.5 * np.sqrt(odds) * cosine / np.sqrt(1.0 + odds * cosine**2)
    return share


def blend(
    images: Float32[Tensor, "batch 3 height stacked_width"],
    partners: Float32[Tensor, "batch 3 height stacked_width"],
    weight: Float32[Tensor, " batch"],
    box: Int64[Tensor, "batch 4"],
    *,
    mix: str,
    tiles: int,
) -> Float32[Tensor, "batch 3 height stacked_width"]:
    """`images` mixed with `partners` by `mix` (mixup or cutmix), in place; weight and box as in `Mixture`, on the device of the images."""
    if mix == "mixup":
        return images.lerp_(partners, (1.0 - weight)[:, None, None, None])
    x0, x1, y0, y1 = box[:, None].expand(-1, tiles, -1).unbind(2)
    inside = box_mask(x0, x1, y0, y1, height=images.shape[2], width=images.shape[3] // tiles)
    return torch.where(inside, partners, images, out=images)
