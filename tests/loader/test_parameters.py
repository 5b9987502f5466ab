"""The parameter table: rows that depend on nothing but their key, ranges, and values that stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.parameters import Column, identity_table, own_tiles, parameter_table

FULL = AugmentConfig(rotate_degrees=10.0, brightness=0.2, contrast=0.3, saturation=0.4, flip_probability=0.5, shift_pixels=3, cutout_size=5)
SEEDS = st.integers(0, 2**63 - 1)


def make(ids: np.ndarray, *, tiles: int, seed: int, epoch: int, augment: AugmentConfig | None, partner: bool = False) -> np.ndarray:
    """The table of samples as they were sharded, for tiles of 24 x 40 pixels."""
    sources = own_tiles(ids, tiles=tiles)
    return parameter_table(ids, sources, tile_size=(24, 40), seed=seed, epoch=epoch, augment=augment, partner=partner)


@given(ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), epoch=st.integers(0, 2**20), seed=SEEDS)
def test_a_row_depends_on_its_own_id_only(ids: list[int], epoch: int, seed: int) -> None:
    together = make(np.array(ids), tiles=3, seed=seed, epoch=epoch, augment=FULL)
    assert together.shape == (len(ids), 3, 10)
    assert together.dtype == np.float32
    for row, sample_id in zip(together, ids, strict=True):
        assert np.array_equal(row, make(np.array([sample_id]), tiles=3, seed=seed, epoch=epoch, augment=FULL)[0])
    fewer = make(np.array(ids), tiles=1, seed=seed, epoch=epoch, augment=FULL)
    assert np.array_equal(fewer[:, 0], together[:, 0])


def test_parameters_fill_their_ranges_and_are_uncorrelated() -> None:
    table = make(np.arange(8_000), tiles=2, seed=1, epoch=2, augment=FULL).reshape(-1, 10).astype(np.float64)
    for column, centre, reach in ((Column.ANGLE, 0.0, 10.0), (Column.BRIGHTNESS, 1.0, 0.2), (Column.CONTRAST, 1.0, 0.3)):
        values = table[:, column]
        assert centre - reach <= values.min() < centre - 0.99 * reach
        assert centre + 0.99 * reach < values.max() < centre + reach
        assert abs(values.mean() - centre) < 0.02 * reach
        assert abs(values.std() - reach / 3**0.5) < 0.02 * reach
    assert set(np.unique(table[:, Column.FLIP])) == {0.0, 1.0}
    assert abs(table[:, Column.FLIP].mean() - 0.5) < 0.016  # 4 sigma
    counts = np.unique(table[:, Column.SHIFT_X], return_counts=True)
    assert counts[0].tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert (abs(counts[1] / 16_000 - 1 / 7) < 0.012).all()
    drawn = [column for column in Column if column != Column.CUT_SIZE]
    for column, side in ((Column.CUT_X, 40), (Column.CUT_Y, 24)):
        assert np.unique(table[:, column]).tolist() == list(range(-2, side - 2))  # the centre is any pixel
    assert (table[:, Column.CUT_SIZE] == 5.0).all()
    correlation = np.corrcoef(table[:, drawn].T) - np.eye(9)
    assert abs(correlation).max() < 0.035  # 4.4 sigma
    left, right = table[0::2], table[1::2]
    assert all(abs(np.corrcoef(left[:, c], right[:, c])[0, 1]) < 0.05 for c in drawn)


def test_operations_that_are_off_leave_the_identity_and_do_not_disturb_others() -> None:
    ids = np.arange(50)
    assert np.array_equal(make(ids, tiles=2, seed=0, epoch=0, augment=None), identity_table(50, tiles=2))
    assert np.array_equal(make(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig()), identity_table(50, tiles=2))
    full = make(ids, tiles=2, seed=0, epoch=0, augment=FULL)
    flips = make(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig(flip_probability=0.5))
    assert np.array_equal(flips[..., Column.FLIP], full[..., Column.FLIP])
    only = identity_table(50, tiles=2)
    only[..., Column.FLIP] = full[..., Column.FLIP]
    assert np.array_equal(flips, only)
    always = make(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig(flip_probability=1.0))
    assert always[..., Column.FLIP].all()


def test_parameters_are_a_fixed_function() -> None:
    row = make(np.array([12_345]), tiles=2, seed=7, epoch=3, augment=FULL)[0, 1]
    assert row.tolist() == pytest.approx(GOLDEN_ROW, rel=1e-7)


GOLDEN_ROW = [-6.458427906036377, 1.0461153984069824, 0.9045937061309814, 1.3417015075683594, 1.0, -1.0, 2.0, 9.0, 13.0, 5.0]
