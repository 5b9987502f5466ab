"""Whitening of a caption bank: a fixed linear map that spends the sphere on what tells captions apart.

Text encoders put the captions of one template into a narrow cone (cosine of a caption with its left-right swap: 0.99),
so that at any sane temperature even a perfect image embedding cannot make the true caption stand out. Centring removes
the cone, PCA whitening gives every kept direction the same variance, and rows are L2-normalised again.

Full whitening overdoes it where a caption is composed of parts: the weak directions hold what the encoder makes of a
*combination* of words, which no sum of features of the single tiles can predict. A strength below 1 keeps them weak.
Source: PCA whitening as in Kessy, Lewin and Strimmer 2018, https://arxiv.org/abs/1512.00809, section 3.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pairclip_fast.errors import DataError


def principal_axes(
    features: Float[Tensor, "n dim"],
) -> tuple[Float64[Tensor, " dim"], Float64[Tensor, " rank"], Float64[Tensor, "dim rank"]]:
    """Mean, variances (descending) and axes of the centred features, as far as float32 features determine them.

    An axis counts if its singular value exceeds `max(n, dim) * eps(float32)` of the largest (numpy's `matrix_rank`).
    The sign of an axis makes its largest component positive, so that the map does not depend on the LAPACK in use.
    """
    rows = features.double()
    mean = rows.mean(0)
    centred = rows - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / rows.shape[0])
    variances, axes = variances.flip(0).clamp_min(0), axes.flip(1)
    tolerance = (max(features.shape) * float(np.finfo(np.float32).eps)) ** 2
    # Rows are unit vectors: variances at the level of float32 rounding are noise even if all of them are.
    floor = float(np.finfo(np.float32).eps) ** 2
    rank = int((variances > max(tolerance * float(variances[0]), floor)).sum())
    axes = axes[:, :rank]
    strongest = axes.abs().argmax(0, keepdim=True)
    return mean, variances[:rank], axes * axes.gather(0, strongest).sign()


def name_means(features: Float[Tensor, "n dim"], *, classes: int) -> Float64[Tensor, "n dim"]:
    """Each caption as the sum of what its left and its right name mean by themselves: the main effects of a two-way layout.

    The features of all captions with the same name on the same side are averaged, so that what the encoder makes of the
    other name in the sentence cancels: row (l, r) becomes `mean over r + mean over l - mean over both`. This is prompt
    ensembling (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.4, which averages a class name over
    80 templates) with the captions of the bank as the templates.

    Args:
        features: The raw bank of a caption template, caption id = left * classes + right.
        classes: Class names that the template was filled with.
    """
    rows = features.double().reshape(classes, classes, -1)
    left, right = rows.mean(1, keepdim=True), rows.mean(0, keepdim=True)
    return (left + right - rows.mean((0, 1))).reshape(classes * classes, -1)


def whitening_map(
    features: Float[Tensor, "n dim"], *, rank: int, strength: float = 1.0
) -> tuple[Float64[Tensor, " dim"], Float64[Tensor, "dim rank"]]:
    """The mean to subtract and the projection to apply.

    Args:
        features: The raw bank.
        rank: Directions to keep, strongest first; limited by the numerical rank of the centred bank.
        strength: Each direction is divided by its standard deviation to this power: 1 whitens, 0 only centres and rotates.

    Raises:
        DataError: all captions have the same feature.
    """
    mean, variances, axes = principal_axes(features)
    if len(variances) == 0:
        raise DataError("the captions cannot be told apart: all have the same text feature", where="the caption bank")
    return mean, axes[:, :rank] * variances[:rank] ** (-strength / 2)


def apply_map(
    features: Float[Tensor, "n dim"], *, mean: Float64[Tensor, " dim"], projection: Float64[Tensor, "dim rank"]
) -> Float[Tensor, "n rank"]:
    """`normalise((features - mean) @ projection)` in float64, returned as float32.

    Raises:
        DataError: a feature lies on the mean, so it has no direction.
    """
    mapped = (features.double() - mean) @ projection
    norms = mapped.norm(dim=-1, keepdim=True)
    if not bool((norms > 1e-6).all()):
        raise DataError("a caption has no direction after whitening", where=f"caption {int(norms.argmin())}", fix="use --bank raw")
    unit: Tensor = mapped / norms
    return unit.float()
