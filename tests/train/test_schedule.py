"""The learning rate at every step, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import OptimizerConfig
from pairclip_fast.train.schedule import learning_rate


def rates(config: OptimizerConfig, *, steps_per_epoch: int, epochs: int) -> list[float]:
    total = steps_per_epoch * epochs
    return [learning_rate(step, config=config, steps_per_epoch=steps_per_epoch, total_steps=total) for step in range(total)]


def test_cosine_with_half_an_epoch_of_warmup() -> None:
    config = OptimizerConfig(lr=1.0, final_lr=0.2, schedule="cosine", warmup_epochs=0.5)
    found = rates(config, steps_per_epoch=4, epochs=2)
    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert found == pytest.approx([0.5, 1.0, *cosine])
    assert found[-1] == pytest.approx(0.2)


def test_linear_without_warmup() -> None:
    config = OptimizerConfig(lr=1.0, final_lr=0.0, schedule="linear", warmup_epochs=0.0)
    assert rates(config, steps_per_epoch=5, epochs=1) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_constant_with_warmup() -> None:
    config = OptimizerConfig(lr=2.0, schedule="constant", warmup_epochs=1.0)
    assert rates(config, steps_per_epoch=2, epochs=2) == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_a_run_of_one_step_has_the_peak() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine", warmup_epochs=0.0)
    assert learning_rate(0, config=config, steps_per_epoch=1, total_steps=1) == 1.0


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    steps_per_epoch=st.integers(1, 50),
    epochs=st.integers(1, 5),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_rates_rise_to_the_peak_and_never_again(schedule: str, steps_per_epoch: int, epochs: int, warmup: float, final: float) -> None:
    config = OptimizerConfig(lr=1.0, final_lr=final, schedule=schedule, warmup_epochs=warmup * epochs)  # type: ignore[arg-type]
    found = rates(config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    top = found.index(max(found))
    assert all(0.0 < rate <= 1.0 + 1e-12 for rate in found[: top + 1])
    assert found[: top + 1] == sorted(found[: top + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(found[top:], found[top + 1 :], strict=False))
