"""The augmentation against an oracle in float64 that is written from the specification, pixel by pixel formulas.

Its deliberately wrong variants show that the tolerance would notice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from augment_oracle import MEAN, STD, oracle
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import Border, augment_tiles, mirrored, rotate_shift_flip, shift_flip
from pairclip_fast.data.parameters import Column, identity_table, own_tiles, parameter_table

TOLERANCE = 0.02
"""In units of the 0..255 scale (design, section 3.4)."""
FULL = AugmentConfig(rotate_degrees=25.0, brightness=0.4, contrast=0.4, saturation=0.6, flip_probability=0.5, shift_pixels=4, cutout_size=7)
BORDERS = ("zero", "reflect")


def in_pixel_units(images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation, in float64: [b, h, w, 3]."""
    return images.permute(0, 2, 3, 1).numpy().astype(np.float64) * np.array(STD) + np.array(MEAN)


def run(tiles: np.ndarray, table: np.ndarray, *, border: Border = "zero") -> np.ndarray:
    planes = torch.from_numpy(tiles).permute(0, 1, 4, 2, 3)
    return in_pixel_units(augment_tiles(planes, torch.from_numpy(table), mean=MEAN, std=STD, border=border))


def random_case(
    config: AugmentConfig | None, *, batch: int = 8, tiles: int = 2, height: int = 32, width: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(1).integers(0, 256, (batch, tiles, height, width, 3), dtype=np.uint8)
    ids = np.arange(batch)
    sources = own_tiles(ids, tiles=tiles)
    return pixels, parameter_table(ids, sources, tile_size=(height, width), seed=3, epoch=1, augment=config)


CONFIGS = {
    "nothing": None,
    "everything": FULL,
    "rotation": AugmentConfig(rotate_degrees=180.0),
    "shift": AugmentConfig(shift_pixels=5),
    "flip": AugmentConfig(flip_probability=0.5),
    "flip and shift": AugmentConfig(flip_probability=0.5, shift_pixels=3),
    "colour": AugmentConfig(brightness=1.0, contrast=1.0, saturation=1.0),
    "colour, flip and shift": AugmentConfig(brightness=0.2, contrast=0.2, saturation=0.2, flip_probability=0.5, shift_pixels=16),
    "cutout": AugmentConfig(cutout_size=8),
    "cutout larger than the tile": AugmentConfig(cutout_size=40, flip_probability=0.5),
}


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_oracle(name: str, border: Border) -> None:
    tiles, table = random_case(CONFIGS[name])
    assert abs(run(tiles, table, border=border) - oracle(tiles, table, border=border)).max() < TOLERANCE


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("tiles", "height", "width"), [(1, 32, 32), (4, 16, 16), (3, 24, 40), (2, 31, 17), (2, 5, 7), (2, 1, 3)])
def test_other_tile_counts_and_sizes(tiles: int, height: int, width: int, border: Border) -> None:
    pixels, table = random_case(FULL, batch=4, tiles=tiles, height=height, width=width)
    result = run(pixels, table, border=border)
    assert result.shape == (4, height, tiles * width, 3)
    assert abs(result - oracle(pixels, table, border=border)).max() < TOLERANCE


WRONG = [
    "centre at half the side",
    "rotates clockwise",
    "shifts the other way",
    "shifts before rotating",
    "nearest neighbour",
    "repeats the edge",
    "rounds after sampling",
    "luma is the mean",
    "contrast about 0.5",
    "contrast about the mean",
    "brightness first",
    "does not clip",
    "does not flip",
    "flips vertically",
    "flips the stacked picture",
    "tiles swapped",
    "cuts before the flip",
    "cuts rows for columns",
    "cuts one pixel more",
    "keeps the square inside",
    "cuts to black",
]
WRONG_BORDERS = ["repeats the edge", "mirrors between pixels", "wraps around"]


@pytest.mark.parametrize(("border", "wrong"), [("zero", wrong) for wrong in WRONG] + [("reflect", wrong) for wrong in WRONG_BORDERS])
def test_a_wrong_operation_would_be_noticed(wrong: str, border: Border) -> None:
    tiles, table = random_case(FULL)
    assert abs(run(tiles, table, border=border) - oracle(tiles, table, border=border, wrong=wrong)).max() > 10 * TOLERANCE


@pytest.mark.parametrize("rotate_degrees", [0.0, 45.0])
def test_mirrors_only_once(rotate_degrees: float) -> None:
    """Tiles smaller than the shift: what lies beyond the mirrored tile repeats its last pixel."""
    tiles, table = random_case(AugmentConfig(shift_pixels=16, rotate_degrees=rotate_degrees), height=6, width=6)
    result = run(tiles, table, border="reflect")
    assert abs(result - oracle(tiles, table, border="reflect")).max() < TOLERANCE
    assert abs(result - oracle(tiles, table, border="reflect", wrong="mirrors again and again")).max() > 10 * TOLERANCE


def test_numpy_mirrors_the_same_way() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 3, 9, 5), dtype=np.uint8)
    for reach in (1, 4):
        expected = np.pad(tiles, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
        assert np.array_equal(mirrored(torch.from_numpy(tiles), reach=reach).numpy(), expected)


@given(
    st.integers(0, 2**32),
    st.floats(-180.0, 180.0),
    st.floats(0.0, 2.0),
    st.floats(0.0, 2.0),
    st.floats(0.0, 2.0),
    st.booleans(),
    st.tuples(st.integers(-16, 16), st.integers(-16, 16)),
    st.tuples(st.integers(-8, 15), st.integers(-8, 15), st.integers(0, 20)),
    st.sampled_from(BORDERS),
)
def test_equals_the_oracle_for_any_parameters(
    seed: int,
    angle: float,
    brightness: float,
    contrast: float,
    saturation: float,
    flip: bool,
    shift: tuple[int, int],
    cut: tuple[int, int, int],
    border: Border,
) -> None:
    tiles = np.random.default_rng(seed).integers(0, 256, (1, 1, 16, 16, 3), dtype=np.uint8)
    table = np.array([[[angle, brightness, contrast, saturation, flip, *shift, *cut]]], dtype=np.float32)
    assert abs(run(tiles, table, border=border) - oracle(tiles, table, border=border)).max() < TOLERANCE


def test_positive_angles_turn_counter_clockwise() -> None:
    tile = np.zeros((1, 1, 32, 32, 3), dtype=np.uint8)
    tile[0, 0, 14:18, 28:32] = 255  # a mark at three o'clock
    table = identity_table(1, tiles=1)
    table[..., Column.ANGLE] = 90.0
    turned = run(tile, table)[0]
    assert turned[0:4, 14:18].min() > 250.0  # is at twelve o'clock
    assert turned[28:32].max() < 1.0


def test_positive_shifts_go_right_and_down() -> None:
    tile = np.zeros((1, 1, 32, 32, 3), dtype=np.uint8)
    tile[0, 0, 10, 20] = 200
    table = identity_table(1, tiles=1)
    table[..., Column.SHIFT_X], table[..., Column.SHIFT_Y] = 3.0, -2.0
    moved = run(tile, table)[0]
    assert np.argwhere(moved[..., 0] > 100.0).tolist() == [[8, 23]]


@pytest.mark.parametrize("name", ["nothing", "shift", "flip", "flip and shift"])
def test_whole_pixels_take_the_same_values_on_both_paths(name: str) -> None:
    tiles, table = random_case(CONFIGS[name], batch=40)
    pixels = torch.from_numpy(tiles).flatten(0, 1).permute(0, 3, 1, 2)
    parameters = torch.from_numpy(table).flatten(0, 1)
    assert torch.equal(shift_flip(pixels, parameters).float(), rotate_shift_flip(pixels, parameters))
    slow, fast = (sample(pixels, parameters, border="reflect").float() for sample in (rotate_shift_flip, shift_flip))
    assert (slow - fast).abs().max() < 1e-2


def test_rows_do_not_depend_on_their_batch() -> None:
    """A batch with one rotated sample sends the others through the general path: same values, up to rounding."""
    tiles, table = random_case(CONFIGS["colour, flip and shift"])
    alone = run(tiles, table)
    mixed = table.copy()
    mixed[0, 0, Column.ANGLE] = 5.0
    assert abs(run(tiles, mixed)[1:] - alone[1:]).max() < 1e-4


@pytest.mark.parametrize("name", ["everything", "rotation", "flip and shift"])
def test_tiles_never_bleed_into_each_other(name: str) -> None:
    """A red and a blue tile: whatever happens to them, the left half has no blue and the right half no red."""
    tiles, table = random_case(CONFIGS[name], batch=64)
    tiles[:, 0], tiles[:, 1] = (255, 0, 0), (0, 0, 255)
    table[..., Column.CUT_SIZE] = 0.0
    table[..., [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1.0
    result = run(tiles, table)
    assert abs(result[:, :, :32, 1:]).max() < 1e-3
    assert abs(result[:, :, 32:, :2]).max() < 1e-3
    assert result[:, 16, 16, 0].min() > 200.0
    assert result[:, 16, 48, 2].min() > 200.0


def test_empty_batch() -> None:
    assert run(np.zeros((0, 2, 32, 32, 3), dtype=np.uint8), identity_table(0, tiles=2)).shape == (0, 32, 64, 3)


def test_torchvision_agrees_on_what_it_shares() -> None:
    """An outside witness for the rotation (fill=None: its fill=0 darkens the border twice), flip, saturation and brightness."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    tiles, table = random_case(AugmentConfig(rotate_degrees=30.0), batch=4, tiles=1)
    mine = run(tiles, table)
    bilinear = functional.InterpolationMode.BILINEAR
    for tile, row, result in zip(tiles[:, 0], table[:, 0], mine, strict=True):
        picture = torch.from_numpy(tile).permute(2, 0, 1).float()
        theirs = functional.rotate(picture, float(row[Column.ANGLE]), interpolation=bilinear, fill=None)
        assert abs(theirs.permute(1, 2, 0).numpy() - result).max() < TOLERANCE
    tiles, table = random_case(AugmentConfig(saturation=0.5, brightness=0.5, flip_probability=0.5), batch=4, tiles=1)
    operations: list[tuple[Column, Callable[..., torch.Tensor]]] = [
        (Column.SATURATION, functional.adjust_saturation),
        (Column.BRIGHTNESS, functional.adjust_brightness),
    ]
    for tile, row, result in zip(tiles[:, 0], table[:, 0], run(tiles, table), strict=True):
        # Their float pictures are clipped after each operation, ours once: compare where nothing was clipped.
        picture = torch.from_numpy(tile).permute(2, 0, 1).double() / 255.0
        for column, operation in operations:
            picture = operation(picture, float(row[column]))
        theirs = (functional.hflip(picture) if row[Column.FLIP] else picture).permute(1, 2, 0).numpy() * 255.0
        inner = (theirs > 0.0).all(axis=2) & (theirs < 255.0).all(axis=2)
        inner &= (result > 0.0).all(axis=2) & (result < 255.0).all(axis=2)
        assert inner.mean() > 0.2
        # Their luma has the weights .2989, .587, .114 (not normalised): 0.03 of 255 apart per unit of saturation.
        assert abs(theirs - result)[inner].max() < 0.1
