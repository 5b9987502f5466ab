"""Denormal numbers are zeros while a run trains, in every thread, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from pairclip_fast.train import commands
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.denormals import denormals_as_zeros
from pairclip_fast.train.options import TrainOptions

TINY = 1e-40
COUNT_IN_ALL_THREADS = f"""
import contextlib, sys, torch
from pairclip_fast.train.denormals import denormals_as_zeros
torch.set_num_threads(4)
with denormals_as_zeros() if sys.argv[1] == "zeros" else contextlib.nullcontext():
    many = torch.full((1 << 22,), 2e-20)
    products, matrix = many * many, torch.full((512, 512), {TINY}) @ torch.ones(512, 512)
print(int(products.count_nonzero()), int(matrix.count_nonzero()))
"""


def is_flushed() -> bool:
    return bool(torch.tensor(TINY) * 1.0 == 0.0)


def test_every_thread_of_a_new_process_flushes_them() -> None:
    """Four threads share each computation; one that does not flush would leave its share."""

    def counts(how: str) -> str:
        return subprocess.run([sys.executable, "-c", COUNT_IN_ALL_THREADS, how], capture_output=True, text=True, check=True).stdout.strip()

    assert counts("zeros") == "0 0"
    assert counts("plain") == f"{1 << 22} {512 * 512}"


@pytest.mark.parametrize("before", [False, True])
def test_the_state_before_comes_back(before: bool) -> None:
    def fail() -> None:
        with denormals_as_zeros():
            assert is_flushed()
            raise KeyError

    torch.set_flush_denormal(before)
    try:
        with pytest.raises(KeyError):
            fail()
        assert is_flushed() == before
    finally:
        torch.set_flush_denormal(False)


def test_a_run_trains_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def looks(*_: object, **__: object) -> Any:
        seen.append(is_flushed())
        raise KeyError

    monkeypatch.setattr(commands, "agree_on_run", looks)
    with pytest.raises(KeyError):
        run_train(TrainOptions())
    assert seen == [True]
    assert not is_flushed()
