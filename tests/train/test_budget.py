"""The memory budget: which way is taken, that it is the same training, and that the prediction holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pairclip_fast.config import RunConfig, load_preset, overlay
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.errors import ConfigError, EnvironmentLackingError
from pairclip_fast.events import Event, EventLog
from pairclip_fast.telemetry.memory import GIB
from pairclip_fast.train import budget, device
from pairclip_fast.train.budget import Fit, Line, ways, within_budget
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.options import TrainOptions, budget_bytes
from pairclip_fast.train.run_folder import choose

CLOSE = 0.15
VIT = load_preset("vit")


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * GIB), ("900MiB", 900 * 2**20), ("1.5 GB", 1_500_000_000), ("2g", 2_000_000_000), ("1TiB", 2**40)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert budget_bytes(TrainOptions(memory_budget=text)) == size


@pytest.mark.parametrize("text", ["plenty", "6", "-1GiB", "0GiB", "6 apples", "GiB", "1e3MiB"])
def test_what_is_no_size_is_refused_at_once(text: str) -> None:
    with pytest.raises(ConfigError, match="memory-budget"):
        choose(TrainOptions(memory_budget=text))


def test_ways_go_from_cheap_to_dear() -> None:
    found = list(ways(VIT))
    assert found[0] == (1, False)
    assert [pieces for pieces, again in found if not again] == [1, 2, 4, 8], "not below 16 of 128 pairs without recomputing"
    assert [pieces for pieces, again in found if again] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert found == sorted(found, key=lambda way: (way[1], way[0]))


def test_of_several_processes_each_cuts_its_own_share() -> None:
    assert [pieces for pieces, again in ways(VIT, world_size=4) if not again] == [1, 2]
    assert [pieces for pieces, again in ways(VIT, world_size=4) if again] == [1, 2, 4, 8, 16, 32]


def test_infonce_is_recomputed_before_it_is_cut() -> None:
    config = overlay(VIT, {"loss": {"kind": "infonce", "label_smoothing": 0.0}}, where="test")
    assert list(ways(config))[:3] == [(1, False), (1, True), (2, True)]


def test_what_is_configured_is_never_undone() -> None:
    config = overlay(VIT, {"optimizer": {"accumulate": 4}, "train": {"recompute": True}}, where="test")
    assert list(ways(config)) == [(4, True), (8, True), (16, True), (32, True), (64, True), (128, True)]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GiB and 10 MiB per pair, a tenth of that with recomputing."""

    def made_up(config: RunConfig, **_: Any) -> Iterator[Fit]:
        for accumulate, recompute in ways(config):
            line = Line(fixed=GIB, per_pair=(1 if recompute else 10) * 2**20)
            yield Fit(accumulate=accumulate, recompute=recompute, predicted=line.at(config.train.batch_size // accumulate))

    monkeypatch.setattr(budget, "predictions", made_up)


WAYS = [(3.0, 1, False), (2.0, 2, False), (1.32, 8, False), (1.27, 1, True), (1.11, 16, True)]


@pytest.fixture
def fitted(data_template: Path, events: EventLog, predicted: None) -> Callable[..., RunConfig]:
    """Fit a configuration into so many GiB."""

    def fit(size_gib: float, config: RunConfig = VIT) -> RunConfig:
        manifest = read_manifest(data_template)
        return within_budget(
            config, data=data_template, manifest=manifest, run=Path(), budget=int(size_gib * GIB), processes=Processes(), events=events
        )

    return fit


@pytest.mark.parametrize(("size_gib", "accumulate", "recompute"), WAYS)
def test_the_cheapest_way_inside_is_taken(
    size_gib: float, accumulate: int, recompute: bool, fitted: Callable[..., RunConfig], recorded: list[Event]
) -> None:
    config = fitted(size_gib)
    assert (config.optimizer.accumulate, config.train.recompute, config.train.batch_size) == (accumulate, recompute, 128)
    assert "GiB predicted" in recorded[-1]["message"]


def test_what_does_not_fit_says_how_much_would(fitted: Callable[..., RunConfig]) -> None:
    with pytest.raises(EnvironmentLackingError, match=r"at least 1\.10 GiB, with 1 pairs"):
        fitted(1.0)


def test_infonce_in_pieces_is_said(fitted: Callable[..., RunConfig], recorded: list[Event]) -> None:
    fitted(1.12, overlay(VIT, {"loss": {"kind": "infonce", "label_smoothing": 0.0}}, where="test"))
    assert "InfoNCE" in recorded[-1]["message"]


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_pieces_are_the_same_training(
    data: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """The bank loss of the whole batch, its gradient and the weights after some steps: in one piece, and in four."""
    from pairclip_fast.train.loop import train_step
    from pairclip_fast.train.planning import parts_on_paper
    from pairclip_fast.train.setup import build_trainee

    monkeypatch.chdir(tmp_path)
    config = choose(TrainOptions(data=data, out=tmp_path / "run", config=write_config(tmp_path, {"optimizer.eps": 1e-3}))).config
    pieces = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, accumulate=4),
        train=dataclasses.replace(config.train, recompute=recompute),
    )
    quiet = EventLog(None, console=False)
    trainees = []
    for one in (config, pieces):
        parts = parts_on_paper(one, data=data, manifest=read_manifest(data), run=tmp_path / "run", events=quiet)
        trainees.append(build_trainee(parts))
    for step in range(3):
        torch.manual_seed(step)
        batch = budget.noise(parts, config.train.batch_size)
        whole, cut = (train_step(trainee, batch, step=step) for trainee in trainees)
        assert torch.allclose(whole.loss, cut.loss, rtol=1e-5)
        assert torch.allclose(whole.grad_norm, cut.grad_norm, rtol=1e-4)
    for mine, theirs in zip(*(trainee.module.parameters() for trainee in trainees), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5)


def test_a_trial_weighs_no_workspace_of_the_size_before(
    data: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would count twice in the slope: 4 GiB were then said to be too little for what took 2.1."""
    monkeypatch.chdir(tmp_path)
    config = choose(TrainOptions(data=data, out=tmp_path / "run", config=write_config(tmp_path))).config
    happened: list[str] = []
    monkeypatch.setattr(device.tower, "drop_free_workspaces", lambda: happened.append("dropped"))
    monkeypatch.setattr(budget, "train_step", lambda _trainee, batch, **_: happened.append(f"{len(batch.valid)} pairs"))
    quiet = EventLog(None, console=False)
    next(budget.predictions(config, data=data, manifest=read_manifest(data), run=tmp_path / "run", processes=Processes(), events=quiet))
    followers = [after for before, after in itertools.pairwise(happened) if before == "dropped"]
    assert followers[: len(budget.TRIAL_PAIRS)] == [f"{pairs} pairs" for pairs in budget.TRIAL_PAIRS]
    assert happened[-1] == "dropped", "before the evaluation"


@pytest.mark.timeout(180)
def test_the_prediction_holds_on_this_cpu(
    data: Path, tmp_path: Path, write_config: Callable[..., Path], train_alone: Callable[..., str]
) -> None:
    """A process of its own, as memory belongs to processes; an encoder with many activations for its parameters."""
    model = {"architecture": "vit", "width": 32, "depth": 4, "heads": 1, "mlp_width": 128, "patch_size": 2}
    changes = {f"model.{name}": value for name, value in model.items()} | {"train.batch_size": 64, "train.epochs": 2}
    config = write_config(tmp_path, changes)
    arguments = ["--data", str(data), "--out", str(tmp_path / "run"), "--config", str(config), "--memory-budget", "4GiB"]
    told = train_alone(*arguments)
    said = next(line for line in told.splitlines() if "GiB predicted" in line)
    predicted = float(said.partition(" GiB predicted")[0].rpartition(" ")[2])
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    memory = next(event for event in events if event["event"] == "memory")
    assert predicted == pytest.approx(memory["peak_with_evaluation_gib"], rel=CLOSE)
    activations = next(row["measured_gib"] for row in memory["rows"] if row["item"] == "activations")
    assert activations > CLOSE * memory["peak_gib"], "or the prediction would hold without them"
