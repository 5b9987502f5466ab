"""Progressive resizing: which step sees which size, that tiles stay apart, and that the work is counted as it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import TileViTConfig, TrainConfig, load_preset, overlay
from pairclip_fast.errors import ConfigError
from pairclip_fast.events import read_events
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions
from pairclip_fast.train.resizing import Phase, Resizer, phases
from pairclip_fast.train.work import RunWork

THREE = ((8, 0.4), (12, 0.3), (16, 0.3))


def test_phases_follow_the_shares() -> None:
    assert phases(THREE, total_steps=10, tile_size=(16, 32)) == (Phase(4, 8, 16), Phase(7, 12, 24), Phase(10, 16, 32))
    assert phases((), total_steps=10, tile_size=(16, 32)) == (Phase(10, 16, 32),)
    assert phases(THREE, total_steps=1, tile_size=(16, 16)) == (Phase(1, 12, 12),), "phases without a step are left out"


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    total_steps=st.integers(1, 200),
    batch_size=st.integers(1, 8),
)
def test_every_step_has_one_size_and_its_work(weights: list[int], total_steps: int, batch_size: int) -> None:
    progressive = tuple((8 + index, weight / sum(weights)) for index, weight in enumerate(weights))
    found = phases(progressive, total_steps=total_steps, tile_size=(32, 32))
    assert found[-1].end == total_steps
    resizer = Resizer(found, tiles=2)
    sizes = [resizer.size(step)[0] for step in range(total_steps)]
    assert sizes == sorted(sizes)
    work = RunWork(batch_size=batch_size, ends=tuple(p.end for p in found), flops_per_pair=tuple(float(p.height**2) for p in found))
    for step in range(total_steps + 1):
        assert work.until(step) == pytest.approx(batch_size * sum(size**2 for size in sizes[:step]))
    assert [work.at(step) for step in range(total_steps)] == [size**2 for size in sizes]
    assert work.mean == pytest.approx(sum(size**2 for size in sizes) / total_steps)


def test_tiles_are_resized_alone() -> None:
    resizer = Resizer((Phase(1, 8, 8), Phase(2, 16, 16)), tiles=2)
    images = torch.randn(3, 3, 16, 32)
    changed = images.clone()
    changed[..., 16:] += 5.0
    small, other = resizer(images, step=0), resizer(changed, step=0)
    assert small.shape == (3, 3, 8, 16)
    assert torch.equal(small[..., :8], other[..., :8])
    torch.testing.assert_close(small[..., 8:] + 5.0, other[..., 8:])
    whole, bled = (F.interpolate(picture, size=(8, 16), mode="bilinear", antialias=True) for picture in (images, changed))
    assert not torch.equal(whole[..., :8], bled[..., :8]), "resizing the whole picture would bleed"
    assert resizer(images, step=1) is images


def test_resizing_is_antialiased() -> None:
    """Stripes one pixel wide become grey, not stripes."""
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1.0
    small = Resizer((Phase(1, 8, 8),), tiles=1)(stripes, step=0)
    torch.testing.assert_close(small[..., 1:-1], torch.full((1, 3, 8, 6), 0.5))


@pytest.mark.parametrize("wrong", [((8, 0.5),), ((8, 0.5), (0, 0.5)), ((8, 1.5), (16, -0.5))])
def test_shares_must_make_sense(wrong: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ConfigError, match=r"train\.progressive"):
        TrainConfig(progressive=wrong)


def test_only_where_the_model_has_no_grid() -> None:
    with pytest.raises(ConfigError, match="tile_conv"):
        overlay(load_preset("fast"), {"model": {"architecture": TileViTConfig().architecture}}, where="test")


def test_a_run_grows_its_tiles_and_counts_its_work(data: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    changes = {"model.architecture": "tile_conv", "model.width": 4, "train.epochs": 5, "train.progressive": [[16, 0.6], [32, 0.4]]}
    run_train(TrainOptions(data=data, out=tmp_path / "run", config=write_config(tmp_path, changes)))
    events = read_events(tmp_path / "run" / "events.jsonl")
    plan = next(event for event in events if event["event"] == "run_started")["plan"]
    small, large = plan["work"]["flops_per_pair"]
    assert small < 0.4 * large
    costs = [event["pflop"] for event in events if event["event"] == "eval"]
    first, last = costs[1] - costs[0], costs[4] - costs[3]
    assert last / first == pytest.approx(large / small)
    assert costs[-1] == pytest.approx(plan["total_pflop"])
    pairs = 5 * plan["steps_per_epoch"] * plan["work"]["batch_size"]
    assert plan["total_pflop"] == pytest.approx(plan["flops_per_pair"] * pairs / 1e15)
    time_s = [event["time_s"] for event in events if event["event"] == "finished"][-1]
    steps = [event["time_s"] for event in events if event["event"] == "step"]
    assert any(spent.get("resize", 0.0) > 0.0 for spent in [*steps, time_s])
