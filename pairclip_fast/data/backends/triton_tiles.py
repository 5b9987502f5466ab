"""One Triton kernel that gathers and augments: from uint8 tiles in GPU memory to a normalised batch in one pass.

A program makes one tile (or a part of it): it draws the tile's parameters from the same Philox blocks as
`data.parameters`, samples, recolours, normalises, cuts out and stores. Nothing comes from the host but which tiles and
whose parameters; a pair costs the bytes of its pixels in and of its floats out. Operations that are switched off are not
compiled in. The parameters equal those of NumPy bit for bit, since they are 24-bit fractions scaled in float64.
"""

from __future__ import annotations

import contextlib
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import CONTRAST_CENTRE, LUMA, WHITE
from pairclip_fast.data.parameters import PARTNER, changes_colour
from pairclip_fast.data.plan import Stream

BLOCK = 1024
"""Pixels per program: one tile of 32 x 32."""
WARPS = 4

COLOUR = tl.constexpr(int(Stream.COLOUR))
GEOMETRY = tl.constexpr(int(Stream.GEOMETRY))
CUTOUT = tl.constexpr(int(Stream.CUTOUT))
FLIP_PHASE = tl.constexpr(int(Stream.FLIP_PHASE))
LUMA_RED, LUMA_GREEN, LUMA_BLUE = (tl.constexpr(weight) for weight in LUMA)
CENTRE, BRIGHTEST = tl.constexpr(CONTRAST_CENTRE), tl.constexpr(WHITE)
RADIANS = tl.constexpr(0.017453292519943295)


@triton.jit
@no_type_check  # the tests' annotation hook would wrap the function that Triton wants to read
def block(seed, epoch, sample, tile, stream):
    """Philox4x32-10 of the counter (epoch, sample, tile, stream)."""
    return tl.philox(seed, epoch.to(tl.uint32), sample.to(tl.uint32), tile.to(tl.uint32), (tile * 0 + stream).to(tl.uint32))


@triton.jit
@no_type_check
def unit(word):
    """The upper 24 bits as a number in [0, 1), in float64."""
    return (word >> 8).to(tl.float64) * 5.9604644775390625e-08


@triton.jit
@no_type_check
def scaled(word, centre, reach):
    """`centre + reach * (2 u - 1)`, rounded once."""
    return (centre + reach * (2.0 * unit(word) - 1.0)).to(tl.float32)


@triton.jit
@no_type_check
def bounded(word, count):
    """An integer in 0..count-1."""
    return tl.umulhi(word, (word * 0 + count).to(tl.uint32)).to(tl.int32)


@triton.jit
@no_type_check
def colour_parameters(
    seed, epoch, sample, tile, STREAMS: tl.constexpr,
    ANGLE: tl.constexpr, BRIGHTNESS: tl.constexpr, CONTRAST: tl.constexpr, SATURATION: tl.constexpr,
):  # fmt: skip
    """Angle, brightness, contrast, saturation."""
    w0, w1, w2, w3 = block(seed, epoch, sample, tile, COLOUR + STREAMS)
    return scaled(w0, 0.0, ANGLE), scaled(w1, 1.0, BRIGHTNESS), scaled(w2, 1.0, CONTRAST), scaled(w3, 1.0, SATURATION)


@triton.jit
@no_type_check
def geometry_parameters(
    seed, epoch, sample, tile, source, TILES: tl.constexpr, STREAMS: tl.constexpr,
    FLIP: tl.constexpr, ALTERNATES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Flip (0 or 1), shift x, shift y."""
    w0, w1, w2, _ = block(seed, epoch, sample, tile, GEOMETRY + STREAMS)
    flip = (unit(w0) < FLIP).to(tl.int32)
    if ALTERNATES:
        phase, _, _, _ = block(seed, epoch * 0, source // TILES, source % TILES, FLIP_PHASE)
        flip = (phase >> 31).to(tl.int32) ^ (epoch & 1)
    return flip, bounded(w1, 2 * SHIFT + 1) - SHIFT, bounded(w2, 2 * SHIFT + 1) - SHIFT


@triton.jit
@no_type_check
def cut_parameters(seed, epoch, sample, tile, STREAMS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """First column and first row of the square."""
    w0, w1, _, _ = block(seed, epoch, sample, tile, CUTOUT + STREAMS)
    return bounded(w0, WIDTH) - SIZE // 2, bounded(w1, HEIGHT) - SIZE // 2


@triton.jit
@no_type_check
def within(position, SIDE: tl.constexpr, REFLECT: tl.constexpr):
    """Where to read for a whole position that may lie outside, and whether there is anything."""
    inside = (position >= 0) & (position < SIDE)
    if REFLECT:
        once = tl.where(position < 0, -position, tl.where(position >= SIDE, 2 * (SIDE - 1) - position, position))
        return tl.minimum(tl.maximum(once, 0), SIDE - 1), position == position
    return tl.where(inside, position, 0), inside


@triton.jit
@no_type_check
def tap(plane, x, y, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr):
    """Pixels of one channel at whole positions, as float32."""
    column, has_column = within(x, WIDTH, REFLECT)
    row, has_row = within(y, HEIGHT, REFLECT)
    return tl.load(plane + row * WIDTH + column, mask=mask & has_column & has_row, other=0).to(tl.float32)


@triton.jit
@no_type_check
def bilinear(plane, x, y, right, below, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr):
    """The four taps around a position, weighted."""
    top = (1.0 - right) * tap(plane, x, y, mask, HEIGHT, WIDTH, REFLECT) + right * tap(plane, x + 1, y, mask, HEIGHT, WIDTH, REFLECT)
    bottom = (1.0 - right) * tap(plane, x, y + 1, mask, HEIGHT, WIDTH, REFLECT) + right * tap(
        plane, x + 1, y + 1, mask, HEIGHT, WIDTH, REFLECT
    )
    return (1.0 - below) * top + below * bottom


@triton.jit(do_not_specialize=["epoch", "seed"])
@no_type_check
def augment_kernel(
    tiles, sources, samples, images, epoch, seed, mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    TILES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, REFLECT: tl.constexpr,
    ANGLE: tl.constexpr, BRIGHTNESS: tl.constexpr, CONTRAST: tl.constexpr, SATURATION: tl.constexpr, RECOLOURS: tl.constexpr,
    FLIP: tl.constexpr, ALTERNATES: tl.constexpr, SHIFT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """See `augment_resident`. Grid: (rows * TILES, blocks of pixels)."""
    number = tl.program_id(0).to(tl.int64)
    tile = (number % TILES).to(tl.int32)
    sample, source = tl.load(samples + number // TILES), tl.load(sources + number)
    epoch = tl.to_tensor(epoch)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, x, y = pixel < HEIGHT * WIDTH, pixel % WIDTH, pixel // WIDTH

    from_x, from_y = x, y
    if (FLIP > 0.0) | (SHIFT > 0):
        flip, shift_x, shift_y = geometry_parameters(seed, epoch, sample, tile, source, TILES, STREAMS, FLIP, ALTERNATES, SHIFT)
        from_x, from_y = tl.where(flip != 0, WIDTH - 1 - x, x) - shift_x, y - shift_y
    if (ANGLE > 0.0) | RECOLOURS:
        angle, brightness, contrast, saturation = colour_parameters(
            seed, epoch, sample, tile, STREAMS, ANGLE, BRIGHTNESS, CONTRAST, SATURATION
        )
    plane = tiles + source * (3 * HEIGHT * WIDTH)
    size: tl.constexpr = HEIGHT * WIDTH
    if ANGLE > 0.0:
        dx, dy = from_x.to(tl.float32) - (WIDTH - 1) / 2, from_y.to(tl.float32) - (HEIGHT - 1) / 2
        cosine, sine = tl.cos(angle * RADIANS), tl.sin(angle * RADIANS)
        u, v = cosine * dx - sine * dy + (WIDTH - 1) / 2, sine * dx + cosine * dy + (HEIGHT - 1) / 2
        left, top = tl.floor(u), tl.floor(v)
        right, below, from_x, from_y = u - left, v - top, left.to(tl.int32), top.to(tl.int32)
        red = bilinear(plane, from_x, from_y, right, below, mask, HEIGHT, WIDTH, REFLECT)
        green = bilinear(plane + size, from_x, from_y, right, below, mask, HEIGHT, WIDTH, REFLECT)
        blue = bilinear(plane + 2 * size, from_x, from_y, right, below, mask, HEIGHT, WIDTH, REFLECT)
    else:
        red = tap(plane, from_x, from_y, mask, HEIGHT, WIDTH, REFLECT)
        green = tap(plane + size, from_x, from_y, mask, HEIGHT, WIDTH, REFLECT)
        blue = tap(plane + 2 * size, from_x, from_y, mask, HEIGHT, WIDTH, REFLECT)
    if RECOLOURS:
        gain = brightness * contrast
        luma = LUMA_RED * red + LUMA_GREEN * green + LUMA_BLUE * blue
        grey = luma * (gain * (1.0 - saturation)) + CENTRE * brightness * (1.0 - contrast)
        red = tl.minimum(tl.maximum(red * (gain * saturation) + grey, 0.0), BRIGHTEST)
        green = tl.minimum(tl.maximum(green * (gain * saturation) + grey, 0.0), BRIGHTEST)
        blue = tl.minimum(tl.maximum(blue * (gain * saturation) + grey, 0.0), BRIGHTEST)
    red, green, blue = (red - mean_red) / std_red, (green - mean_green) / std_green, (blue - mean_blue) / std_blue
    if CUT > 0:
        cut_x, cut_y = cut_parameters(seed, epoch, sample, tile, STREAMS, HEIGHT, WIDTH, CUT)
        cut = (x >= cut_x) & (x < cut_x + CUT) & (y >= cut_y) & (y < cut_y + CUT)
        red, green, blue = tl.where(cut, 0.0, red), tl.where(cut, 0.0, green), tl.where(cut, 0.0, blue)
    out = images + number // TILES * (3 * TILES * size) + y * (TILES * WIDTH) + tile * WIDTH + x
    tl.store(out, red, mask=mask)
    tl.store(out + TILES * size, green, mask=mask)
    tl.store(out + 2 * TILES * size, blue, mask=mask)


def augment_resident(
    tiles: UInt8[Tensor, "sources 3 height width"],
    sources: Int64[Tensor, "batch tiles"],
    ids: Int64[Tensor, " batch"],
    *,
    epoch: int,
    seed: int,
    partner: bool,
    augment: AugmentConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float32[Tensor, "batch 3 height stacked_width"]:
    """Rows of augmented, normalised tiles side by side; the parameters are those of `parameters.parameter_table`.

    Args:
        tiles: All tiles of the split, on the device.
        sources: Which tiles, on the device.
        ids: Whose parameters, on the device.
        epoch: Epoch number.
        seed: Key, in 0..2**63-1.
        partner: Draw from the streams of partners in mixtures.
        augment: Ranges and border.
        mean: Per channel, in units of 0..255.
        std: Per channel, in units of 0..255.
    """
    (batch, count), (height, width) = sources.shape, tiles.shape[2:]
    images = torch.empty(batch, 3, height, count * width, dtype=torch.float32, device=tiles.device)
    if batch:
        constants = compile_time(augment, partner=partner, tiles=count, height=height, width=width)
        grid = (batch * count, triton.cdiv(height * width, BLOCK))
        with torch.cuda.device(tiles.device) if tiles.is_cuda else contextlib.nullcontext():  # Triton starts where the thread is
            augment_kernel[grid](tiles, sources, ids, images, epoch, seed, *mean, *std, **constants, num_warps=WARPS)
    return images


def compile_time(augment: AugmentConfig, *, partner: bool, tiles: int, height: int, width: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "TILES": tiles,
        "HEIGHT": height,
        "WIDTH": width,
        "BLOCK": BLOCK,
        "STREAMS": PARTNER * partner,
        "REFLECT": augment.border == "reflect",
        "ANGLE": augment.rotate_degrees,
        "BRIGHTNESS": augment.brightness,
        "CONTRAST": augment.contrast,
        "SATURATION": augment.saturation,
        "RECOLOURS": changes_colour(augment),
        "FLIP": augment.flip_probability,
        "ALTERNATES": augment.alternating_flip,
        "SHIFT": augment.shift_pixels,
        "CUT": augment.cutout_size,
    }
