"""Going on where a loader stopped: exactly, at once, from a few integers, with other batches and other ranks."""

from __future__ import annotations

import json
import time

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
