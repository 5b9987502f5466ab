"""The augmentation in float64, written from the specification: what every backend is measured against.

It shares no code and no formulation with the package: it samples with explicit taps, applies the colour operations one
after the other, flips, and cuts out at the end. `wrong` names an error to make: the tolerance has to notice each of them.
"""

from __future__ import annotations

import numpy as np

MEAN = (125.0, 120.0, 110.0)
STD = (60.0, 61.0, 65.0)


def sample_bilinear(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`picture` [h, w, 3] at real positions; taps outside contribute 0."""
    height, width = picture.shape[:2]
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = np.zeros((*x.shape, 3))
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1.0 - abs(x - column)) * (1.0 - abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            taps = picture[row.clip(0, height - 1), column.clip(0, width - 1)]
            total += np.where(inside, weight, 0.0)[..., None] * taps
    return total


def oracle_tile(tile: np.ndarray, row: np.ndarray, *, wrong: str = "") -> np.ndarray:
    """One tile [h, w, 3] through the specification, in units of 0..255; `wrong` names an error to make."""
    angle, brightness, contrast, saturation, flip, shift_x, shift_y = (float(v) for v in row[:7])
    picture = tile.astype(np.float64)
    height, width = picture.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    if wrong == "centre at half the side":
        centre_x, centre_y = width / 2, height / 2
    radians = np.deg2rad(-angle if wrong == "rotates clockwise" else angle)
    dx, dy = x - centre_x - shift_x, y - centre_y - shift_y
    if wrong == "shifts the other way":
        dx, dy = x - centre_x + shift_x, y - centre_y + shift_y
    if wrong == "shifts before rotating":
        dx, dy = x - centre_x, y - centre_y
    sx = np.cos(radians) * dx - np.sin(radians) * dy + centre_x
    sy = np.sin(radians) * dx + np.cos(radians) * dy + centre_y
    if wrong == "shifts before rotating":
        sx, sy = sx - shift_x, sy - shift_y
    if wrong == "nearest neighbour":
        sx, sy = np.round(sx), np.round(sy)
    if wrong == "repeats the edge":
        sx, sy = sx.clip(0, width - 1), sy.clip(0, height - 1)
    picture = sample_bilinear(picture, sx, sy)
    if wrong == "rounds after sampling":
        picture = np.round(picture)
    weights = np.array([1 / 3, 1 / 3, 1 / 3]) if wrong == "luma is the mean" else np.array([0.299, 0.587, 0.114])
    grey = (picture @ weights)[..., None]
    centre = {"contrast about 0.5": 0.5, "contrast about the mean": float(grey.mean())}.get(wrong, 128.0)
    if wrong == "brightness first":
        picture, grey = picture * brightness, grey * brightness
    picture = grey + saturation * (picture - grey)
    picture = centre + contrast * (picture - centre)
    if wrong != "brightness first":
        picture = picture * brightness
    if wrong != "does not clip":
        picture = picture.clip(0.0, 255.0)
    if flip and wrong != "does not flip":
        picture = picture[::-1] if wrong == "flips vertically" else picture[:, ::-1]
    return picture


def oracle(tiles: np.ndarray, table: np.ndarray, *, wrong: str = "") -> np.ndarray:
    """Stacked pictures [b, h, t * w, 3] in units of 0..255."""
    rows = []
    for sample, parameters in zip(tiles, table, strict=True):
        parts = [oracle_tile(tile, row, wrong=wrong) for tile, row in zip(sample, parameters, strict=True)]
        if wrong == "tiles swapped":
            parts = parts[::-1]
        stacked = np.concatenate(parts, axis=1)
        if wrong == "flips the stacked picture":
            parts = [part[:, ::-1] if row[Column.FLIP] else part for part, row in zip(parts, parameters, strict=True)]
            stacked = np.concatenate(parts, axis=1)
            stacked = stacked[:, ::-1] if parameters[0, Column.FLIP] else stacked
        rows.append(stacked)
    return np.stack(rows)


