"""Whole runs on a tiny data folder: exact resume, crashes, bad numbers, full disks, and what a user may get wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from pairclip_fast.data.manifest import MANIFEST_NAME
from pairclip_fast.errors import CheckpointError, ConfigError, DataError, EnvironmentLackingError, NumericsError, RunBusyError, StorageError
from pairclip_fast.events import Event, EventLog, read_events
from pairclip_fast.kernels.ops import implementation
from pairclip_fast.storage import FileSystem, FolderLock
from pairclip_fast.telemetry import timing
from pairclip_fast.train import checkpoint, loop, planning, precision
from pairclip_fast.train.commands import render_eval, render_train, run_eval, run_train
from pairclip_fast.train.options import EvalOptions, TrainOptions
from pairclip_fast.train.signals import TerminatedRunError

STEPS = 12
CONTRACT = {
    "split",
    "num_pairs",
    "num_captions",
    "top1",
    "top10",
    "top100",
    "mrr",
    "median_rank",
    "left_top1",
    "right_top1",
    "swap_rate",
    "seconds",
}
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
Options = Callable[..., TrainOptions]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved any more."""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is an event; nothing is measured that the test does not need."""
    monkeypatch.setattr(timing, "STEP_EVENT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_MATRIX", 64)
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(planning, "training_flops_per_pair", lambda *_, **__: 1e6)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="session")
def whole(data_template: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
    """Folder and result of the tiny run, uninterrupted; on one thread as every test, for this comes before the fixture that sees to it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        return folder / "run", run_train(TrainOptions(data=data_template, out=folder / "run", config=write_config(folder)))


@pytest.fixture
def options(data: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Options:
    """Options of a tiny run, with changes of the configuration and of the flags."""

    def make(changes: dict[str, Any] | None = None, *, out: str = "run", **flags: Any) -> TrainOptions:
        flags = {"data": data, "config": write_config(tmp_path, changes)} | flags
        return TrainOptions(out=tmp_path / out, **flags)

    return make


def at_step(step: int, action: Callable[[], None]) -> EventLog:
    """A log that acts when the event of `step` comes."""
    log = EventLog(None, console=False)

    def sink(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            action()

    log.subscribe(sink)
    return log


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


def losses(run: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and scale by step, of the last attempt that made it."""
    found = {}
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "step":
            found[event["step"]] = (event["loss"], event["grad_norm"], event["logit_scale"])
    return found


def weights(run: Path) -> dict[str, str]:
    """Digests of the tensor files of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-????????"))[-1]
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in ("model.safetensors", "optimizer.safetensors")}


def best_and_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that does not depend on the time."""
    metrics = {name: value for name, value in result["metrics"].items() if name != "seconds"}
    return {name: value for name, value in result.items() if name not in ("seconds", "metrics", "run")} | metrics


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with size and time of change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_a_run_leaves_everything_the_contract_names(options: Options, tmp_path: Path) -> None:
    result = run_train(options())
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    wanted = {"config.toml", "environment.json", "events.jsonl", "captions.safetensors", "manifest.json", "checkpoints", "evaluations"}
    assert wanted <= names
    assert set(result["metrics"]) >= CONTRACT
    assert json.loads((run / "evaluations" / "val.json").read_bytes()) == result["metrics"]
    with np.load(run / "evaluations" / "val.npz") as arrays:
        assert arrays["ranks"].shape == (24,)
        assert float((arrays["ranks"] == 1).mean()) == result["metrics"]["top1"]
    events = read_events(run / "events.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds.index("run_started") < kinds.index("step") < kinds.index("eval") < kinds.index("finished")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, STEPS + 1))
    plan = next(event["plan"] for event in events if event["event"] == "run_started")
    fields = (
        "num_train num_val num_captions parameters flops_per_pair steps_per_epoch epochs total_pflop eta_s device precision loader compile"
    )
    assert set(fields.split()) <= set(plan)
    assert (plan["num_train"], plan["num_val"], plan["num_captions"], plan["steps_per_epoch"]) == (70, 24, 16, 4)
    kernels = implementation(torch.device("cpu"))
    assert plan["kernels"] == f"{kernels.name} ({kernels.reason})"
    step = next(event for event in events if event["event"] == "step")
    fields = (
        "step epoch samples_seen loss lr logit_scale grad_norm pairs_per_second tflops peak_share data_wait_fraction pflop eta_s memory"
    )
    assert set(fields.split()) <= set(step)
    assert step["eta_s"] >= 0
    assert 0 < step["memory"]["rss_gib"] <= step["memory"]["peak_rss_gib"]
    evaluations = [event for event in events if event["event"] == "eval"]
    assert [event["epoch"] for event in evaluations] == [0, 1, 2]
    best = max(evaluations, key=lambda event: event["metrics"]["top1"])
    assert result["best"]["step"] == best["step"]
    assert result["metrics"]["top1"] == best["metrics"]["top1"]
    assert (run / "checkpoints" / result["best"]["checkpoint"]).is_dir()
    assert result["metrics"]["top1"] > 3 / 16
    assert "top-1" in render_train(result)
    assert not list(run.rglob("*.p*kl*"))


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


def test_a_checkpoint_of_another_model_is_refused_with_the_names(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    found = checkpoint.load(path)
    model = {name: value for name, value in found.model.items() if "head.bias" not in name} | {"module.extra": torch.ones(2)}
    store = checkpoint.CheckpointStore(path.parent, events=EventLog(None, console=False))
    store.save(dataclasses.replace(found, model=model), step=3, best=None)
    with pytest.raises(CheckpointError) as caught:
        run_train(options(resume=True))
    assert caught.value.exit_code == 4
    assert "module.encoder.head.bias" in str(caught.value)
    assert "module.extra" in str(caught.value)


def test_an_optimizer_state_with_holes_is_refused(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    found = checkpoint.load(path)
    store = checkpoint.CheckpointStore(path.parent, events=EventLog(None, console=False))
    optimizer = {name: value for name, value in found.optimizer.items() if name != "encoder.head.weight/exp_avg"}
    store.save(dataclasses.replace(found, optimizer=optimizer), step=3, best=None)
    with pytest.raises(CheckpointError, match=r"encoder\.head\.weight/exp_avg"):
        run_train(options(resume=True))


def test_damage_costs_one_checkpoint_and_is_said(options: Options, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(out="parts"), events=at_step(6, terminate))
    file = tmp_path / "parts" / "checkpoints" / "step-00000006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run_train(options(out="parts", resume=True))
    assert weights(whole[0]) == weights(tmp_path / "parts")
    started = [event for event in read_events(tmp_path / "parts" / "events.jsonl") if event["event"] == "run_started"]
    assert [event["resumed_step"] for event in started] == [0, 4]
    fallbacks = [event for event in read_events(tmp_path / "parts" / "events.jsonl") if event["event"] == "fallback"]
    assert any("step-00000006" in event["reason"] for event in fallbacks)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_before_the_update(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, whole: tuple[Path, dict[str, Any]]
) -> None:
    forward, step = loop.LossModule.forward, loop.train_step

    def poisoned(self: loop.LossModule, *arguments: Any) -> torch.Tensor:
        value = forward(self, *arguments)
        return value * float("nan") if bad == "loss" else value + (self.loss.logit_scale - self.loss.logit_scale.detach()).abs().sqrt()

    def poisoned_step(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(loop.LossModule, "forward", poisoned if named["step"] == 5 else forward)
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", poisoned_step)
    with pytest.raises(NumericsError, match="step 5") as caught:
        run_train(options())
    assert caught.value.exit_code == 7
    events = read_events(tmp_path / "run" / "events.jsonl")
    (event,) = [event for event in events if event["event"] == "numerics"]
    assert len(event["sample_ids"]) == len(event["caption_ids"]) == 16
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4]
    monkeypatch.undo()
    hurry(monkeypatch)
    run_train(options(resume=True))
    assert weights(tmp_path / "run") == weights(whole[0])


def test_out_of_memory_saves_and_says_what_may_fit(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]
) -> None:
    step = loop.train_step

    def exploding(*arguments: Any, **named: Any) -> Any:
        if named["step"] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", exploding)
    with pytest.raises(EnvironmentLackingError, match="--batch-size 8") as caught:
        run_train(options())
    assert caught.value.exit_code == 5
    monkeypatch.setattr(loop, "train_step", step)
    run_train(options(resume=True))
    assert losses(tmp_path / "run") == losses(whole[0])
    assert weights(tmp_path / "run") == weights(whole[0])


def fail_writes(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path], bool]) -> None:
    write = FileSystem.write

    def full(self: FileSystem, file: IO[bytes], data: bytes | memoryview) -> None:
        if when(Path(file.name)):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, data)

    monkeypatch.setattr(FileSystem, "write", full)


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_a_note(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def while_second_epoch(path: Path) -> bool:
        return path.name == "optimizer.safetensors" and len(losses(tmp_path / "run")) == 8

    fail_writes(monkeypatch, while_second_epoch)
    assert run_train(options())["reason"] == "epochs"
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4, 12]
    assert any("could not be saved" in event["message"] for event in events if event["event"] == "note")


def test_a_last_save_that_fails_is_exit_8(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]
) -> None:
    fail_writes(monkeypatch, lambda path: path.name == "optimizer.safetensors" and len(losses(tmp_path / "run")) >= 8)
    with pytest.raises(StorageError, match="bytes free") as caught:
        run_train(options())
    assert caught.value.exit_code == 8
    monkeypatch.undo()
    hurry(monkeypatch)
    assert run_train(options(resume=True))["steps"] == STEPS
    assert weights(tmp_path / "run") == weights(whole[0])


def test_early_stopping_counts_evaluations_without_a_better_one(options: Options, tmp_path: Path) -> None:
    still = {"optimizer.kind": "adamw", "optimizer.lr": 1e-12, "optimizer.warmup_epochs": 0.0}
    result = run_train(options({"train.patience": 2, "train.epochs": 40} | still))
    assert (result["reason"], result["epochs"], result["best"]["step"]) == ("early_stop", 3, 4)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_a_dry_run_tells_the_plan_and_touches_nothing(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    choice = options()
    before = tree(tmp_path)
    result = run_train(dataclasses.replace(choice, dry_run=True))
    assert tree(tmp_path) == before
    assert result["plan"]["steps_per_epoch"] == 4
    assert result["plan"]["parameters"] > 1_000
    assert "plan:" in capsys.readouterr().err
    assert "nothing was written" in render_train(result)
    with pytest.raises(DataError, match="pairclip-fast shard"):
        run_train(TrainOptions(dry_run=True, data=tmp_path / "nowhere"))


def test_missing_data_leaves_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="pairclip-fast shard"):
        run_train(TrainOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_data_is_refused(options: Options) -> None:
    with pytest.raises(ConfigError, match="--batch-size"):
        run_train(options(batch_size=128))


@pytest.mark.parametrize("loss", ["bank", "infonce"])
def test_raw_bank_and_both_losses_train(options: Options, loss: str) -> None:
    result = run_train(options({"bank.kind": "raw", "train.epochs": 1, "loss.label_smoothing": 0.0}, loss=loss))
    assert result["steps"] == 4


def test_amp_trains_in_bfloat16_where_the_cpu_has_it(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path with autocast; emulated here, so the choice is forced."""
    monkeypatch.setattr(precision, "cpu_bf16_feature", lambda: "AMX")
    result = run_train(options(amp=True))
    plan = next(event["plan"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "run_started")
    assert plan["precision"] == "bf16 (AMX)"
    assert result["metrics"]["top1"] > 3 / 16


def test_eval_repeats_the_final_evaluation_and_other_splits_and_folders(
    tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    run, result = shutil.copytree(whole[0], tmp_path / "run"), whole[1]
    for given in (None, data):
        metrics = run_eval(EvalOptions(run=run, data=given))
        # The run was fed by the loader of its configuration, `eval` by this machine's own; their pixels agree to the last bits.
        free = {"seconds": 0, "loss": 0}
        assert {**metrics, **free} == {**result["metrics"], **free}
        assert metrics["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-6)
    assert "x chance" in render_eval(metrics)
    assert run_eval(EvalOptions(run=run, split="test"))["num_pairs"] == 24
    assert run_eval(EvalOptions(run=run, split="train"))["num_pairs"] == 70
    assert {path.name for path in (run / "evaluations").glob("*.json")} == {"val.json", "test.json", "train.json"}
    shutil.rmtree(data)
    with pytest.raises(DataError):
        run_eval(EvalOptions(run=run, data=data))


def test_eval_normalises_other_data_as_the_training_was(tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    """The same pictures under a manifest with other statistics must be ranked the same."""
    run, result = shutil.copytree(whole[0], tmp_path / "run"), whole[1]
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    changed = {"mean": [value / 2 + 3 for value in manifest["mean"]], "std": [value * 3 for value in manifest["std"]]}
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | changed))
    metrics = run_eval(EvalOptions(run=run, data=data))
    assert metrics["top1"] == result["metrics"]["top1"]
    assert metrics["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_eval_refuses_other_classes_and_missing_splits(tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"class_names": ["red thing", "green thing", "blue thing", "zebra"]}))
    with pytest.raises(DataError, match="zebra"):
        run_eval(EvalOptions(run=whole[0], data=data))
    splits = {name: split for name, split in manifest["splits"].items() if name != "test"}
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"splits": splits}))
    with pytest.raises(DataError, match="no such split"):
        run_eval(EvalOptions(run=whole[0], data=data, split="test"))
    with pytest.raises(ConfigError, match="not a run folder"):
        run_eval(EvalOptions(run=tmp_path))


def test_a_folder_without_val_split_trains_to_the_last_weights(options: Options, tmp_path: Path, data: Path) -> None:
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    splits = {name: split for name, split in manifest["splits"].items() if name == "train"}
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"splits": splits}))
    result = run_train(options())
    assert (result["metrics"], result["best"], result["steps"]) == (None, None, STEPS)
    assert run_eval(EvalOptions(run=tmp_path / "run", split="train"))["num_pairs"] == 70
    assert run_train(options(resume=True))["metrics"] is None


def test_the_bank_travels_with_the_run(options: Options, tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(6, terminate))
    (data / "captions.safetensors").unlink()
    run_train(options(resume=True))
    assert not (data / "captions.safetensors").exists()
    assert weights(tmp_path / "run") == weights(whole[0])


def test_tensorboard_is_a_view_or_a_clear_error(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentLackingError, match=r"pip install 'pairclip-fast\[tensorboard\]'"):
        run_train(options({"train.tensorboard": True}))
