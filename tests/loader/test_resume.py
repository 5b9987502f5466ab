"""Going on where a loader stopped: exactly, at once, from a few integers, with other batches and other ranks."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_backend import Open, assert_same, endless

from pairclip_fast.data.loader import Batch
from pairclip_fast.data.plan import Plan
from pairclip_fast.errors import DataError


def test_resume_anywhere_is_exact(backend: str, open_loader: Open) -> None:
    whole = open_loader(backend)
    expected = [*whole, *whole, *whole]
    interrupted = open_loader(backend)
    seen: list[Batch] = []
    for stop in (3, 7, 1, 10, 100):
        for count, batch in enumerate(endless(interrupted), start=1):
            seen.append(batch)
            if count == stop or len(seen) == len(expected):
                break
        state = json.loads(json.dumps(interrupted.state_dict()))
        assert len(json.dumps(state)) < 300
        interrupted.close()
        if len(seen) == len(expected):
            break
        interrupted = open_loader(backend)
        interrupted.load_state_dict(state)
    for first, second in zip(seen, expected, strict=True):
        assert_same(first, second)


def test_state_counts_what_was_delivered_not_what_was_prefetched(backend: str, open_loader: Open) -> None:
    loader = open_loader(backend)
    iterator = iter(loader)
    states = []
    for _ in range(7):
        next(iterator)
        time.sleep(0.01)  # lets the thread run ahead
        states.append((loader.state_dict()["epoch"], loader.state_dict()["cursor"]))
    assert states == [(0, 16), (0, 32), (0, 48), (0, 64), (0, 80), (0, 96), (1, 0)]
    assert next(iterator, None) is None
    assert (loader.state_dict()["epoch"], loader.state_dict()["cursor"]) == (1, 0)


def test_the_batch_size_may_change_at_a_resume(backend: str, open_loader: Open) -> None:
    first = open_loader(backend, augment=None)
    iterator = iter(first)
    ids = [next(iterator).sample_ids for _ in range(2)]
    second = open_loader(backend, augment=None, batch_size=9, drop_last=True)
    second.load_state_dict(first.state_dict())
    ids += [batch.sample_ids[batch.valid] for batch in second]
    order = Plan(num_samples=103, batch_size=1, seed=5).order(0)
    assert torch.cat(ids).tolist() == order[: 32 + 71 // 9 * 9].tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"shuffle": False}, {"augment": None}, {"encoding": "png"}], ids=["seed", "shuffle", "augment", "data"]
)
def test_a_state_of_another_stream_is_refused(change: dict[str, object], open_loader: Open) -> None:
    state = open_loader("reference").state_dict()
    other = open_loader("reference", **change)
    (name,) = (name for name in state if other.state_dict()[name] != state[name])
    with pytest.raises(DataError) as caught:
        other.load_state_dict(state)
    assert f"{name}={state[name]}" in str(caught.value.expected)
    assert f"{name}={other.state_dict()[name]}" in str(caught.value.got)


@pytest.mark.parametrize("damage", [{"cursor": -1}, {"cursor": 104}, {"epoch": -1}, {"cursor": "x"}, {"v": 2}, {"epoch": None}], ids=str)
def test_a_damaged_state_is_refused(damage: dict[str, object], open_loader: Open) -> None:
    loader = open_loader("reference")
    state = {key: value for key, value in {**loader.state_dict(), **damage}.items() if value is not None}
    with pytest.raises(DataError):
        loader.load_state_dict(state)


def test_a_hundred_epochs_whatever_the_ranks_and_the_stops(backend: str, make_folder: Callable[..., Path], open_loader: Open) -> None:
    """Each id once per epoch, in the plan's order; stopped at random places, each time going on with other ranks and batches."""
    folder, rng = make_folder(np.zeros((103, 2, 4, 4, 3), dtype=np.uint8)), random.Random(0)
    settings: dict[str, Any] = {"folder": folder, "augment": None, "seed": 2**63 - 1}
    state = open_loader(backend, **settings).state_dict()
    seen: dict[int, list[int]] = {}
    while int(state["epoch"]) < 100:
        world_size = rng.choice((1, 2, 3))
        batch_size = world_size * rng.randint(5, 40)
        ranks = [open_loader(backend, batch_size=batch_size, world_size=world_size, rank=rank, **settings) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for batches in itertools.islice(zip(*map(endless, ranks), strict=True), rng.randint(1, 50)):
            assert len({(batch.epoch, batch.step) for batch in batches}) == 1
            seen.setdefault(batches[0].epoch, []).extend(int(i) for batch in batches for i in batch.sample_ids[batch.valid])
        state = ranks[0].state_dict()
        assert all(loader.state_dict() == state for loader in ranks)
        assert len(json.dumps(state)) < 300
        for loader in ranks:
            loader.close()
    plan = Plan(num_samples=103, batch_size=1, seed=2**63 - 1)
    for epoch in range(100):
        assert seen[epoch] == plan.order(epoch).tolist()


def test_the_first_batch_after_a_resume_comes_at_once(backend: str, open_loader: Open) -> None:
    """The best of several tries: others use this machine too. And nothing before the place is read."""
    loader = open_loader(backend, augment=None)
    state, seconds = loader.state_dict(), []
    next(iter(loader))  # the reference backend has read the whole split by then
    for epoch in range(10, 30):
        loader.set_epoch(0)  # ends what runs
        read = loader.stats.bytes_read
        started = time.perf_counter()
        loader.load_state_dict({**state, "epoch": epoch, "cursor": 80})
        batch = next(iter(loader))
        seconds.append(time.perf_counter() - started)
        assert (batch.epoch, batch.step) == (epoch, 5)
        assert loader.stats.bytes_read - read <= 2 * 16 * 6144
    limit_s = 0.010 if backend == "native" else 0.050  # the others took 13 ms and more on a busy machine, with types checked
    assert min(seconds) < limit_s
