"""The plan: every id once, whatever the split into steps and ranks; parameters that depend on nothing but their key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.plan import Column, Plan, identity_table, parameter_table
from pairclip_fast.errors import ConfigError

FULL = AugmentConfig(rotate_degrees=10.0, brightness=0.2, contrast=0.3, saturation=0.4, flip_probability=0.5, shift_pixels=3)
SEEDS = st.integers(0, 2**63 - 1)


def delivered(plan: Plan, epoch: int) -> np.ndarray:
    """The ids of one epoch in global order, put together from the slices of all ranks."""
    parts = []
    for step in range(plan.steps_per_epoch):
        for rank in range(plan.world_size):
            mine = Plan(**{**_fields(plan), "rank": rank})
            parts.append(mine.step_ids(epoch, step)[mine.step_valid(epoch, step)])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _fields(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in Plan.__slots__}


@given(n=st.integers(1, 300), local=st.integers(1, 40), world=st.integers(1, 4), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_id_exactly_once_over_the_ranks(n: int, local: int, world: int, seed: int, epoch: int) -> None:
    plan = Plan(num_samples=n, batch_size=local * world, world_size=world, seed=seed, drop_last=False)
    ids = delivered(plan, epoch)
    assert sorted(ids.tolist()) == list(range(n))
    assert np.array_equal(ids, plan.order(epoch))


@given(n=st.integers(1, 300), local=st.integers(1, 40), world=st.integers(1, 4), seed=SEEDS)
def test_dropping_the_last_batch_drops_only_the_tail(n: int, local: int, world: int, seed: int) -> None:
    if local * world > n:
        with pytest.raises(ConfigError, match="batch size"):
            Plan(num_samples=n, batch_size=local * world, world_size=world, seed=seed)
        return
    plan = Plan(num_samples=n, batch_size=local * world, world_size=world, seed=seed)
    whole = n // plan.batch_size * plan.batch_size
    assert np.array_equal(delivered(plan, 2), plan.order(2)[:whole])
    assert all(plan.step_valid(2, step).all() for step in range(plan.steps_per_epoch))


@given(n=st.integers(2, 500), seed=SEEDS, epoch=st.integers(0, 100))
def test_global_order_knows_neither_batch_nor_ranks(n: int, seed: int, epoch: int) -> None:
    one = Plan(num_samples=n, batch_size=1, seed=seed, drop_last=False)
    many = Plan(num_samples=n, batch_size=12, world_size=3, rank=2, seed=seed, drop_last=False)
    assert np.array_equal(one.order(epoch), many.order(epoch))


@given(n=st.integers(1, 200), batches=st.lists(st.integers(1, 50), min_size=1, max_size=6), seed=SEEDS)
def test_changing_the_batch_size_midway_keeps_the_sequence(n: int, batches: list[int], seed: int) -> None:
    seen: list[int] = []
    cursor = 0
    for batch in [*batches, n]:
        plan = Plan(num_samples=n, batch_size=batch, seed=seed, drop_last=False)
        if plan.steps_from(cursor) == 0:
            break
        ids, valid = plan.ids_at(0, cursor=cursor)
        assert plan.valid_at(cursor) == valid.sum()
        seen += ids[valid].tolist()
        cursor += batch
    assert seen == plan.order(0)[: len(seen)].tolist()


def test_ranks_have_the_same_number_of_equally_large_batches() -> None:
    plans = [Plan(num_samples=101, batch_size=12, world_size=4, rank=rank, seed=1, drop_last=False) for rank in range(4)]
    assert {plan.steps_per_epoch for plan in plans} == {9}
    last = [plan.step_valid(0, 8).tolist() for plan in plans]
    assert last == [[True] * 3, [True, True, False], [False] * 3, [False] * 3]
    assert {len(plan.step_ids(0, 8)) for plan in plans} == {3}


def test_order_is_a_fixed_function() -> None:
    # Recorded once: a resumed run of any later version must see the same order.
    assert Plan(num_samples=10, batch_size=1, seed=7).order(3).tolist() == GOLDEN_ORDER


def test_epochs_seeds_and_positions_look_independent() -> None:
    orders = [Plan(num_samples=4_000, batch_size=1, seed=seed).order(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32, 0))]
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(first, np.arange(4_000))[0, 1]) < 0.06  # 3.8 sigma
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert Plan(num_samples=5, batch_size=2, seed=3, shuffle=False).order(9).tolist() == [0, 1, 2, 3, 4]


def test_every_id_is_first_equally_often() -> None:
    firsts = np.bincount([Plan(num_samples=6, batch_size=1, seed=0).order(epoch)[0] for epoch in range(1_200)], minlength=6)
    assert (firsts > 150).all()  # expected 200, sigma 13
    assert (firsts < 250).all()


def test_order_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Plan(num_samples=5, batch_size=1, seed=0).order(0)[0] = 1


@pytest.mark.parametrize(
    "wrong", [{"num_samples": 0}, {"batch_size": 0}, {"rank": 2}, {"rank": -1}, {"world_size": 0}, {"batch_size": 3}], ids=str
)
def test_impossible_plans_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Plan(**{"num_samples": 10, "batch_size": 4, "seed": 0, "world_size": 2, "rank": 0, **wrong})


@given(ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), epoch=st.integers(0, 2**20), seed=SEEDS)
def test_a_row_depends_on_its_own_id_only(ids: list[int], epoch: int, seed: int) -> None:
    together = parameter_table(np.array(ids), tiles=3, seed=seed, epoch=epoch, augment=FULL)
    assert together.shape == (len(ids), 3, 7)
    assert together.dtype == np.float32
    for row, sample_id in zip(together, ids, strict=True):
        assert np.array_equal(row, parameter_table(np.array([sample_id]), tiles=3, seed=seed, epoch=epoch, augment=FULL)[0])
    fewer = parameter_table(np.array(ids), tiles=1, seed=seed, epoch=epoch, augment=FULL)
    assert np.array_equal(fewer[:, 0], together[:, 0])


def test_parameters_fill_their_ranges_and_are_uncorrelated() -> None:
    table = parameter_table(np.arange(8_000), tiles=2, seed=1, epoch=2, augment=FULL).reshape(-1, 7).astype(np.float64)
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
    correlation = np.corrcoef(table.T) - np.eye(7)
    assert abs(correlation).max() < 0.035  # 4.4 sigma
    left, right = table[0::2], table[1::2]
    assert all(abs(np.corrcoef(left[:, c], right[:, c])[0, 1]) < 0.05 for c in Column)


def test_operations_that_are_off_leave_the_identity_and_do_not_disturb_others() -> None:
    ids = np.arange(50)
    assert np.array_equal(parameter_table(ids, tiles=2, seed=0, epoch=0, augment=None), identity_table(50, tiles=2))
    assert np.array_equal(parameter_table(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig()), identity_table(50, tiles=2))
    full = parameter_table(ids, tiles=2, seed=0, epoch=0, augment=FULL)
    flips = parameter_table(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig(flip_probability=0.5))
    assert np.array_equal(flips[..., Column.FLIP], full[..., Column.FLIP])
    only = identity_table(50, tiles=2)
    only[..., Column.FLIP] = full[..., Column.FLIP]
    assert np.array_equal(flips, only)
    always = parameter_table(ids, tiles=2, seed=0, epoch=0, augment=AugmentConfig(flip_probability=1.0))
    assert always[..., Column.FLIP].all()


def test_parameters_are_a_fixed_function() -> None:
    row = parameter_table(np.array([12_345]), tiles=2, seed=7, epoch=3, augment=FULL)[0, 1]
    assert row.tolist() == pytest.approx(GOLDEN_ROW, rel=1e-7)


GOLDEN_ORDER = [5, 6, 1, 7, 3, 9, 0, 8, 2, 4]
GOLDEN_ROW = [-6.458427906036377, 1.0461153984069824, 0.9045937061309814, 1.3417015075683594, 1.0, -1.0, 2.0]
