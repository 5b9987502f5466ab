"""The plan: every id once, whatever the split into steps and ranks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.data.plan import Plan
from pairclip_fast.errors import ConfigError

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


IdsAt = Callable[..., tuple[np.ndarray, np.ndarray]]


def never_or_twice(count: int, *, epochs: int, ids_at: IdsAt = Plan.ids_at) -> int:
    """Ids that did not come exactly once in some epoch, which is left and entered again with other batches and ranks."""
    rng, wrong = random.Random(count), 0
    for epoch in range(epochs):
        times, cursor = np.zeros(count, dtype=np.int64), 0
        while cursor < count:
            world_size = rng.choice((1, 2, 3, 8, 16))
            batch_size = world_size * rng.randint(1, 8_192 // world_size)
            ranks = [
                Plan(num_samples=count, batch_size=batch_size, seed=9, world_size=world_size, rank=rank, drop_last=False)
                for rank in range(world_size)
            ]
            for _ in range(min(rng.randint(1, 4), ranks[0].steps_from(cursor))):
                for plan in ranks:
                    ids, valid = ids_at(plan, epoch, cursor=cursor)
                    times[ids[valid]] += 1
                cursor += batch_size
        wrong += int((times != 1).sum())
    return wrong


@pytest.mark.parametrize("count", [45_000, 50_000])
def test_a_hundred_epochs_of_full_size(count: int) -> None:
    assert never_or_twice(count, epochs=100) == 0


def overlapping(plan: Plan, epoch: int, *, cursor: int) -> tuple[np.ndarray, np.ndarray]:
    return Plan.ids_at(plan, epoch, cursor=max(cursor - 1, 0))


def without_ranks(plan: Plan, epoch: int, *, cursor: int) -> tuple[np.ndarray, np.ndarray]:
    return Plan.ids_at(dataclasses.replace(plan, rank=0), epoch, cursor=cursor)


def shuffled_again(plan: Plan, epoch: int, *, cursor: int) -> tuple[np.ndarray, np.ndarray]:
    """As by a loader that draws a new order for each number of ranks."""
    return Plan.ids_at(dataclasses.replace(plan, seed=plan.world_size), epoch, cursor=cursor)


@pytest.mark.parametrize("wrong", [overlapping, without_ranks, shuffled_again])
def test_wrong_plans_would_be_noticed(wrong: IdsAt) -> None:
    assert never_or_twice(5_000, epochs=20, ids_at=wrong) > 0


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


GOLDEN_ORDER = [5, 6, 1, 7, 3, 9, 0, 8, 2, 4]
