"""Augmentation version 1 in plain torch: the definition in code, and fast enough to train with.

Per tile, in float and without rounding in between: rotate about the centre and shift (one bilinear sampling; taps outside
contribute 0, or are those of the tile mirrored about its edge pixels) -> saturation (luma .299 .587 .114) -> contrast about
128 -> brightness -> clip to [0, 255] -> horizontal flip -> (x - mean) / std -> cutout (0). Each tile has its own parameters
and its own border, so no tile bleeds into its neighbour and left never becomes right.

Operations that the whole batch leaves out cost nothing. Without rotation the sampling is a copy of a window of the padded
uint8 tile, several times cheaper than `grid_sample`, and gives the same values. Everything is elementwise or a gather: no
matrix product, whose precision on CUDA is a global setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Num, UInt8
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional

from pairclip_fast.data.parameters import Column

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma."""
CONTRAST_CENTRE = 128.0
WHITE = 255.0
Border = Literal["zero", "reflect"]
Box = Num[Tensor, "batch tiles"]


def augment_tiles(
    tiles: UInt8[Tensor, "batch tiles 3 height width"],
    table: Float32[Tensor, "batch tiles 10"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    border: Border = "zero",
) -> Float32[Tensor, "batch 3 height stacked_width"]:
    """Augment and normalise tiles, and set the tiles of a sample side by side.

    Args:
        tiles: Pixels 0..255, on any device.
        table: Parameters as in `parameters.Column`, on the CPU (which operations run is decided from it, without a device sync).
        mean: Per channel, in units of 0..255.
        std: Per channel, in units of 0..255.
        border: What rotation and shift show beyond the edge; see `AugmentConfig.border`.

    Returns:
        Normalised pictures, width = tiles * tile width.
    """
    pixels, parameters = tiles.flatten(0, 1), table.flatten(0, 1)
    if bool(parameters[:, Column.ANGLE].any()):
        sampled: Tensor = rotate_shift_flip(pixels, parameters, border=border)
    else:
        moves = bool(parameters[:, [Column.FLIP, Column.SHIFT_X, Column.SHIFT_Y]].any())
        sampled = shift_flip(pixels, parameters, border=border) if moves else pixels
    if not torch.equal(parameters[:, _COLOUR], torch.ones(len(parameters), len(_COLOUR))):
        sampled = recolour_(sampled.float(), parameters)
    batch, num_tiles, channels, height, width = tiles.shape
    pictures = sampled.view(tiles.shape).permute(0, 2, 3, 1, 4)
    joined = torch.empty(batch, channels, height, num_tiles * width, device=tiles.device)
    joined.view(pictures.shape).copy_(pictures)  # type conversion and transposition in one pass
    joined.sub_(_channels(mean, joined.device)).div_(_channels(std, joined.device))
    return cut_out(joined, table) if bool(table[..., Column.CUT_SIZE].any()) else joined


def cut_out(
    images: Float32[Tensor, "batch 3 height stacked_width"], table: Float32[Tensor, "batch tiles 10"]
) -> Float32[Tensor, "batch 3 height stacked_width"]:
    """Set the pixels of each tile's square to 0, the mean of the channel, in place."""
    x, y, size = (table[..., c].to(images.device, non_blocking=True) for c in (Column.CUT_X, Column.CUT_Y, Column.CUT_SIZE))
    inside = box_mask(x, x + size, y, y + size, height=images.shape[2], width=images.shape[3] // table.shape[1])
    return images.masked_fill_(inside, 0.0)


def box_mask(x0: Box, x1: Box, y0: Box, y1: Box, *, height: int, width: int) -> Bool[Tensor, "batch 1 height stacked_width"]:
    """Which pixels of stacked tiles of `height` x `width` lie in their tile's box x0 <= x < x1, y0 <= y < y1."""
    columns, rows = torch.arange(width, device=x0.device), torch.arange(height, device=x0.device)
    across = (columns >= x0[..., None]) & (columns < x1[..., None])
    down = (rows >= y0[..., None]) & (rows < y1[..., None])
    return (down.mT[..., None] & across[:, None]).flatten(2)[:, None]


def rotate_shift_flip(
    pixels: UInt8[Tensor, "n 3 height width"], parameters: Float32[Tensor, "n 10"], *, border: Border = "zero"
) -> Float32[Tensor, "n 3 height width"]:
    """Sample each tile at R(angle) (destination - centre - shift) + centre, bilinearly.

    The flip belongs after the colour operations, which are per pixel, so it may be done here: a flipped destination is
    one with its x, counted from the centre, negated. For sides that are a power of two a whole-pixel shift is exact with a
    border of 0.
    """
    height, width = pixels.shape[2:]
    column = {c: parameters[:, c, None, None].to(pixels.device, non_blocking=True) for c in Column}
    from_centre_x = torch.arange(width, device=pixels.device) - (width - 1) / 2
    from_centre_y = (torch.arange(height, device=pixels.device) - (height - 1) / 2)[:, None]
    x = from_centre_x * (1.0 - 2.0 * column[Column.FLIP]) - column[Column.SHIFT_X]
    y = from_centre_y - column[Column.SHIFT_Y]
    radians = torch.deg2rad(column[Column.ANGLE])
    cosine, sine = torch.cos(radians), torch.sin(radians)
    grid = torch.empty(len(pixels), height, width, 2, device=pixels.device)
    grid[..., 0], grid[..., 1] = cosine * x - sine * y, sine * x + cosine * y
    if border == "zero":
        # align_corners=False counts in pixel edges: -1 and 1 are the outer edges, and the centre of the tile is 0.
        scale = torch.tensor((2.0 / width, 2.0 / height), device=pixels.device)
        return functional.grid_sample(pixels.float(), grid.mul_(scale), mode="bilinear", padding_mode="zeros", align_corners=False)
    # align_corners=True: -1 and 1 are the centres of the edge pixels. Torch mirrors there again and again, we once: 3 is one
    # tile further, where the mirrored tile ends and its last pixel is repeated.
    scale = torch.tensor([2.0 / max(side - 1, 1) for side in (width, height)], device=pixels.device)
    grid = grid.mul_(scale).clamp_(-3.0, 3.0)
    return functional.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def shift_flip(
    pixels: UInt8[Tensor, "n 3 height width"], parameters: Float32[Tensor, "n 10"], *, border: Border = "zero"
) -> UInt8[Tensor, "n 3 height width"]:
    """`rotate_shift_flip` for angles of 0: whole-pixel windows of the padded tile, then the flip."""
    height, width = pixels.shape[2:]
    shifts = parameters[:, [Column.SHIFT_X, Column.SHIFT_Y]].to(torch.int64)
    reach = int(shifts.abs().max()) if len(shifts) else 0
    padded = functional.pad(pixels, (reach,) * 4) if border == "zero" else mirrored(pixels, reach=reach)
    number, (first_column, first_row) = torch.arange(len(pixels)), (reach - shifts).unbind(1)
    flipped = parameters[:, Column.FLIP].nonzero().squeeze(1)
    if pixels.device.type == "cpu":  # numpy copies whole rows where torch indexes byte by byte: a third of the time
        windows = sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))
        taken = windows[number.numpy(), :, first_row.numpy(), first_column.numpy()]
        taken[flipped.numpy()] = taken[flipped.numpy(), ..., ::-1]
        return torch.from_numpy(taken)
    number, first_column, first_row, flipped = (i.to(pixels.device, non_blocking=True) for i in (number, first_column, first_row, flipped))
    moved = padded.unfold(2, height, 1).unfold(3, width, 1)[number, :, first_row, first_column]
    return moved.index_copy_(0, flipped, moved[flipped].flip(3))


def mirrored(pixels: UInt8[Tensor, "n 3 height width"], *, reach: int) -> UInt8[Tensor, "n 3 padded_height padded_width"]:
    """`reach` more pixels on every side, mirrored about the centre of the edge pixel (-1 is 1), once; beyond that repeated."""
    padded = functional.pad(pixels, (reach,) * 4)
    for dimension in (3, 2):
        last = pixels.shape[dimension] - 1
        for distance in range(1, reach + 1):
            padded.select(dimension, reach - distance).copy_(padded.select(dimension, reach + min(distance, last)))
            padded.select(dimension, reach + last + distance).copy_(padded.select(dimension, reach + max(last - distance, 0)))
    return padded


def recolour_(pixels: Float32[Tensor, "n 3 height width"], parameters: Float32[Tensor, "n 10"]) -> Float32[Tensor, "n 3 height width"]:
    """Saturation, contrast, brightness and clip, in place.

    With s, c, b the three factors, b (128 + c (luma + s (x - luma) - 128)) is one affine map:
    b c s x + b c (1 - s) luma + 128 b (1 - c).
    """
    saturation, contrast, brightness = (
        parameters[:, c, None, None, None].to(pixels.device, non_blocking=True)
        for c in (Column.SATURATION, Column.CONTRAST, Column.BRIGHTNESS)
    )
    gain = brightness * contrast
    luma = pixels[:, 0:1] * LUMA[0]
    luma.add_(pixels[:, 1:2], alpha=LUMA[1]).add_(pixels[:, 2:3], alpha=LUMA[2])
    grey = luma.mul_(gain * (1.0 - saturation)).add_(CONTRAST_CENTRE * brightness * (1.0 - contrast))
    return pixels.mul_(gain * saturation).add_(grey).clamp_(0.0, WHITE)


_COLOUR = [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]


def _channels(values: Sequence[float], device: torch.device) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
