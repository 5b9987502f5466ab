"""A run that was stopped anywhere and resumed equals the uninterrupted one, and resuming harms nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import STEPS, Killed, Options, at_step, best_and_metrics, kill, losses, terminate, tree, weights

from pairclip_fast.data.places import MANIFEST_NAME
from pairclip_fast.errors import ConfigError, RunBusyError
from pairclip_fast.events import read_events
from pairclip_fast.storage import FolderLock
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions
from pairclip_fast.train.signals import TerminatedRunError

OTHER_RUN = {
    "model.architecture": "tile_conv",
    "model.width": 4,
    "optimizer.kind": "muon",
    "optimizer.accumulate": 2,
    "optimizer.ema_decay": 0.0,
    "train.epochs": 1,
    "augment.border": "reflect",
    "augment.cutout_size": 6,
    "augment.swap_probability": 0.5,
    "augment.pairing": "resampled",
    "augment.mix": "cutmix",
}
"""Batch statistics, muon's momentum, micro-batches, no averages; mixtures of pairs that are new each epoch."""

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_two_runs_are_equal_and_another_seed_is_not(options: Options, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    again = run_train(options())
    assert losses(tmp_path / "run") == losses(whole[0])
    assert weights(tmp_path / "run") == weights(whole[0])
    assert best_and_metrics(again) == best_and_metrics(whole[1])
    run_train(options(dict.fromkeys(["train.epochs"], 1), out="other", seed=1))
    assert losses(tmp_path / "other")[1] != losses(whole[0])[1]


@pytest.mark.parametrize(
    "changes",
    [None, OTHER_RUN],
    ids=["vit", "tile_conv"],
)
def test_a_run_stopped_anywhere_and_resumed_equals_the_uninterrupted_one(
    options: Options, tmp_path: Path, changes: dict[str, Any] | None, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Mid-epoch, between the last step of an epoch and its evaluation, and at the very end; stopped again and again."""
    run, expected = whole if changes is None else (tmp_path / "run", run_train(options(changes)))
    points = (1, 4, 6, 12) if changes is None else (3,)
    for step in points:
        with pytest.raises(TerminatedRunError, match="--resume") as caught:
            run_train(options(changes, out="parts", resume=True), events=at_step(step, terminate))
        assert caught.value.exit_code == 143
        assert (tmp_path / "parts" / "checkpoints" / f"step-{step:08d}").is_dir()
    result = run_train(options(changes, out="parts", resume=True))
    assert losses(run) == losses(tmp_path / "parts")
    assert weights(run) == weights(tmp_path / "parts")
    assert best_and_metrics(result) == best_and_metrics(expected)
    logged = read_events(tmp_path / "parts" / "events.jsonl")
    assert [event["step"] for event in logged if event["event"] == "signal"] == list(points)
    assert {event["attempt"] for event in logged} == set(range(1, len(points) + 2))


@pytest.mark.parametrize("step", [2, 10])
def test_a_killed_run_goes_back_to_its_last_checkpoint_and_still_ends_the_same(
    options: Options, tmp_path: Path, step: int, whole: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(Killed):
        run_train(options(out="parts"), events=at_step(step, kill))
    run_train(options(out="parts", resume=True))
    assert losses(whole[0]) == losses(tmp_path / "parts")
    assert weights(whole[0]) == weights(tmp_path / "parts")
    steps = [event["step"] for event in read_events(tmp_path / "parts" / "events.jsonl") if event["event"] == "step"]
    assert steps == [*range(1, step + 1), *range(1 + step // 4 * 4, STEPS + 1)]


def test_sigusr1_saves_and_goes_on(options: Options, tmp_path: Path) -> None:
    log = at_step(6, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run_train(options(), events=log)["steps"] == STEPS
    saved = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "checkpoint"]
    assert saved == [4, 6, 8, 12]


def test_the_clock_saves_too(options: Options, tmp_path: Path) -> None:
    run_train(options({"train.save_minutes": 1e-9, "train.epochs": 1}))
    saved = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "checkpoint"]
    assert saved == [1, 2, 3, 4, 4]


def test_a_finished_run_gives_its_result_and_touches_nothing(options: Options, whole: tuple[Path, dict[str, Any]]) -> None:
    run, result = whole
    before = tree(run)
    again = run_train(dataclasses.replace(options(), out=run, resume=True))
    assert tree(run) == before
    assert best_and_metrics(again | {"pflop": result["pflop"]}) == best_and_metrics(result)


def test_a_run_that_lost_its_last_evaluation_makes_it_again(options: Options, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations")
    again = run_train(options(resume=True))
    assert best_and_metrics(again) == best_and_metrics(whole[1])
    assert (tmp_path / "run" / "evaluations" / "val.json").is_file()


def test_a_run_that_resume_starts_is_said(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name with a typo would otherwise train from the beginning without a word."""
    run_train(options(out="typo", resume=True, epochs=1))
    assert f"there is no run in {tmp_path / 'typo'} to resume" in capsys.readouterr().err
    run_train(options(out="typo", resume=True, epochs=1))
    assert "to resume" not in capsys.readouterr().err


def test_resume_without_out_takes_the_newest_run(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run"):
        run_train(TrainOptions(resume=True))
    with pytest.raises(TerminatedRunError):
        run_train(dataclasses.replace(options({"train.epochs": 1}), out=None), events=at_step(2, terminate))
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("vit-")
    with pytest.raises(ConfigError, match="no run of preset fast"):
        run_train(TrainOptions(resume=True, preset="fast"))
    assert run_train(TrainOptions(resume=True))["run"] == str(run.relative_to(tmp_path))


def test_a_used_folder_needs_resume_and_a_foreign_one_is_left_alone(
    options: Options, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        run_train(dataclasses.replace(options(), out=whole[0]))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all my work")
    before = tree(foreign)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="not empty"):
            run_train(options(out="foreign", resume=resume))
    assert tree(foreign) == before


def test_a_busy_run_is_left_alone(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    with FolderLock(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(RunBusyError, match="pid"):
                run_train(options(resume=resume))


def test_resume_refuses_another_configuration_and_other_data(options: Options, tmp_path: Path, data: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.01 -> 0\.5"):
        run_train(options(resume=True, lr=0.5))
    with pytest.raises(ConfigError, match=r"train\.seed"):
        run_train(options(resume=True, seed=3))
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"seed": 17}))
    with pytest.raises(ConfigError, match="data digest"):
        run_train(options(resume=True))
    (data / MANIFEST_NAME).write_text(json.dumps(manifest))
    edited = tmp_path / "run" / "config.toml"
    edited.write_text(edited.read_text().replace("weight_decay = 0.05", "weight_decay = 0.06"))
    with pytest.raises(ConfigError, match="weight_decay"):
        run_train(options(resume=True))
    edited.write_text(edited.read_text().replace("weight_decay = 0.06", "weight_decay = 0.05"))
    assert run_train(options(resume=True, compile="off"))["reason"] == "epochs"


def test_the_bank_travels_with_the_run(options: Options, tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(6, terminate))
    (data / "captions.safetensors").unlink()
    run_train(options(resume=True))
    assert not (data / "captions.safetensors").exists()
    assert weights(tmp_path / "run") == weights(whole[0])
