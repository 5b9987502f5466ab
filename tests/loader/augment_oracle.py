"""The augmentation in float64, written from the specification: what every backend is measured against.

It shares no code and no formulation with the package: it samples with explicit taps, applies the colour operations one
after the other, flips, and cuts out at the end. `wrong` names an error to make: the tolerance has to notice each of them.
"""

from __future__ import annotations

import numpy as np

MEAN = (125.0, 120.0, 110.0)
STD = (60.0, 61.0, 65.0)
FLIP = 4
"""Column of the parameter table."""


def tap(picture: np.ndarray, row: np.ndarray, column: np.ndarray, *, border: str, wrong: str) -> np.ndarray:
    """The pixels at whole positions, which may lie outside."""
    height, width = picture.shape[:2]
    if border == "zero" and wrong != "repeats the edge":
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        return np.where(inside[..., None], picture[row.clip(0, height - 1), column.clip(0, width - 1)], 0.0)

    def outside(position: np.ndarray, side: int) -> np.ndarray:
        if wrong == "repeats the edge":
            return position
        if wrong == "mirrors between pixels":
            return np.where(position < 0, -1 - position, np.where(position >= side, 2 * side - 1 - position, position))
        if wrong == "wraps around":
            return position % side
        if wrong == "mirrors again and again":
            return side - 1 - abs(side - 1 - abs(position))
        return np.where(position < 0, -position, np.where(position >= side, 2 * (side - 1) - position, position))

    return picture[outside(row, height).clip(0, height - 1), outside(column, width).clip(0, width - 1)]


def sample_bilinear(picture: np.ndarray, x: np.ndarray, y: np.ndarray, *, border: str, wrong: str) -> np.ndarray:
    """`picture` [h, w, 3] at real positions."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = np.zeros((*x.shape, 3))
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1.0 - abs(x - column)) * (1.0 - abs(y - row))
            total += weight[..., None] * tap(picture, row, column, border=border, wrong=wrong)
    return total


def oracle_tile(tile: np.ndarray, row: np.ndarray, *, border: str = "zero", wrong: str = "") -> np.ndarray:  # noqa: C901 - the errors
    """One tile [h, w, 3] through the specification, in units of 0..255; what is cut out is the mean."""
    angle, brightness, contrast, saturation, flip, shift_x, shift_y, cut_x, cut_y, cut_size = (float(v) for v in row)
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
    picture = sample_bilinear(picture, sx, sy, border=border, wrong=wrong)
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
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    if wrong == "cuts before the flip" and flip:
        columns = columns[:, ::-1]
    if wrong == "cuts rows for columns":
        columns, rows = rows, columns
    if wrong == "cuts one pixel more":
        cut_size += 1.0
    if wrong == "keeps the square inside":
        cut_x, cut_y = np.clip(cut_x, 0, width - cut_size), np.clip(cut_y, 0, height - cut_size)
    inside = (columns >= cut_x) & (columns < cut_x + cut_size) & (rows >= cut_y) & (rows < cut_y + cut_size)
    return np.where(inside[..., None], 0.0 if wrong == "cuts to black" else np.array(MEAN), picture)


def oracle(tiles: np.ndarray, table: np.ndarray, *, border: str = "zero", wrong: str = "") -> np.ndarray:
    """Stacked pictures [b, h, t * w, 3] in units of 0..255."""
    rows = []
    for sample, parameters in zip(tiles, table, strict=True):
        parts = [oracle_tile(tile, row, border=border, wrong=wrong) for tile, row in zip(sample, parameters, strict=True)]
        if wrong == "tiles swapped":
            parts = parts[::-1]
        stacked = np.concatenate(parts, axis=1)
        if wrong == "flips the stacked picture":
            parts = [part[:, ::-1] if row[FLIP] else part for part, row in zip(parts, parameters, strict=True)]
            stacked = np.concatenate(parts, axis=1)
            stacked = stacked[:, ::-1] if parameters[0, FLIP] else stacked
        rows.append(stacked)
    return np.stack(rows)
