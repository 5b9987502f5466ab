"""The whitening stem: fixed 2x2 filters under which the training pictures have uncorrelated channels of equal variance.

Neighbouring pixels are nearly equal, so what a first layer learns from raw pixels is mostly brightness, and the rest slowly.
Projecting 2x2 patches on the eigenvectors of their covariance, each divided by its standard deviation, undoes that before
training starts; the filters need no gradient, and so no weight-gradient convolution at the largest resolution. Every filter
comes with its negative because an activation follows, which would else drop half of the information.

Source: D. Page, "How to train your ResNet 8: bag of tricks" (2019); K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a
single GPU" (2024), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

PATCH = 2
AXES = 3 * PATCH**2
FILTERS = 2 * AXES
"""Output channels: one for each direction in a patch's space, and one for its opposite."""
FLOOR = 5e-4
"""Added to the variances (of normalised pixels): directions in which the pictures hardly vary are noise, not to be blown up."""


class WhitenedStem(nn.Module):
    """A valid 2x2 convolution with fixed filters and a trained bias: [B, 3, H, W] to [B, 24, H - 1, W - 1].

    Until `fit` has seen pictures, the filters are the single pixels of a patch and their negatives.

    Args:
        activation: Follows; none by default.
    """

    weight: Tensor
    """[24, 3, 2, 2]; a buffer: saved with the model, not trained."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation or nn.Identity()
        self.register_buffer("weight", _with_opposites(torch.eye(AXES)))
        self.bias = nn.Parameter(torch.zeros(FILTERS))

    def forward(self, tiles: Float[Tensor, "folded 3 height width"]) -> Float[Tensor, "folded 24 rows columns"]:
        activated: Tensor = self.activation(F.conv2d(tiles, self.weight, self.bias))
        return activated

    @torch.no_grad()
    def fit(self, tiles: Float[Tensor, "folded 3 height width"]) -> None:
        """Set the filters from pictures; a few hundred suffice, in double precision so that every machine finds the same."""
        self.weight.copy_(_with_opposites(whitening(tiles.double())))


def whitening(tiles: Float[Tensor, "folded 3 height width"]) -> Float[Tensor, "12 12"]:
    """Rows that map a patch (channel, row, column) to uncorrelated values of second moment 1 (about 0: pixels come normalised)."""
    patches = rearrange(tiles.unfold(2, PATCH, 1).unfold(3, PATCH, 1), "n c y x p q -> (n y x) (c p q)")
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    rows: Tensor = (directions / (variances + FLOOR).sqrt()).T
    return rows


def _with_opposites(rows: Float[Tensor, "12 12"]) -> Float[Tensor, "24 3 2 2"]:
    return rearrange(torch.cat([rows, -rows]), "f (c p q) -> f c p q", c=3, p=PATCH)
