"""Whole runs on a tiny data folder: what they leave, what they print, how they end, and what `eval` makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import STEPS, Options, tree

from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.places import MANIFEST_NAME
from pairclip_fast.errors import ConfigError, DataError, EnvironmentLackingError
from pairclip_fast.events import Event, EventLog, read_events
from pairclip_fast.kernels.ops import implementation
from pairclip_fast.report.commands import run_report
from pairclip_fast.train import precision
from pairclip_fast.train.commands import render_eval, render_train, run_eval, run_train
from pairclip_fast.train.options import EvalOptions, TrainOptions
from pairclip_fast.train.starting import finished_result

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

pytestmark = pytest.mark.usefixtures("in_a_hurry")


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
    kernels = implementation(torch.device("cpu"), dtype=torch.float32, dim=64)
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
    with pytest.raises(ConfigError, match="pairclip-fast shard"):
        run_train(TrainOptions(dry_run=True, data=tmp_path / "nowhere"))


def test_missing_data_leaves_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pairclip-fast shard"):
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


def test_eval_normalises_other_data_as_the_training_was(
    tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]], events: EventLog, recorded: list[Event]
) -> None:
    """The same pictures under a manifest with other statistics must be ranked the same."""
    run, result = shutil.copytree(whole[0], tmp_path / "run"), whole[1]
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    changed = {"mean": [value / 2 + 3 for value in manifest["mean"]], "std": [value * 3 for value in manifest["std"]]}
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | changed))
    metrics = run_eval(EvalOptions(run=run, data=data), events=events)
    (said,) = [event["message"] for event in recorded if event["event"] == "note"]
    assert "trained on" not in said, "its pictures are those that were held out"
    assert metrics["top1"] == result["metrics"]["top1"]
    assert metrics["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_a_result_on_other_data_is_not_the_runs_own(
    tmp_path: Path, data_template: Path, whole: tuple[Path, dict[str, Any]], events: EventLog, recorded: list[Event]
) -> None:
    """The same pictures split by another seed: most of the val split has been trained on."""
    run, result, other = shutil.copytree(whole[0], tmp_path / "run"), whole[1], tmp_path / "other"
    pictures = {"path": data_template.parent / "train", "test_path": data_template.parent / "test"}
    run_shard(ShardOptions(source="imagefolder", out=other, num_pairs=70, val_fraction=0.2, seed=1, **pictures), events)
    recorded.clear()
    metrics = run_eval(EvalOptions(run=run, data=other), events=events)
    (said,) = [event["message"] for event in recorded if event["event"] == "note"]
    digest = read_manifest(other).digest
    name = f"val-{digest[:8]}.json"
    assert "may contain images that were trained on" in said
    assert name in said
    assert (metrics["data"], metrics["step"]) == (digest, result["best"]["step"])
    assert json.loads((run / "evaluations" / name).read_bytes()) == metrics
    own = json.loads((run / "evaluations" / "val.json").read_bytes())
    assert own == result["metrics"]
    assert (own["data"], own["step"]) == (read_manifest(run).digest, result["best"]["step"])
    assert run_report(run, events=events)["metrics"]["top1"] == result["metrics"]["top1"]
    (run / "evaluations" / "val.json").unlink()
    assert run_report(run, events=events)["split"] == "val", "from the log"
    assert finished_result(run, events=events) is None


def test_a_result_of_other_weights_is_not_the_runs_own(tmp_path: Path, whole: tuple[Path, dict[str, Any]], events: EventLog) -> None:
    """Somebody evaluates a run that is going on, and the final evaluation never comes."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    path = run / "evaluations" / "val.json"
    assert finished_result(run, events=events) is not None
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"step": 1}))
    assert finished_result(run, events=events) is None


def test_eval_refuses_other_classes_and_missing_splits(tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    manifest = json.loads((data / MANIFEST_NAME).read_bytes())
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"class_names": ["red thing", "green thing", "blue thing", "zebra"]}))
    with pytest.raises(DataError, match="zebra"):
        run_eval(EvalOptions(run=whole[0], data=data))
    splits = {name: split for name, split in manifest["splits"].items() if name != "test"}
    (data / MANIFEST_NAME).write_text(json.dumps(manifest | {"splits": splits}))
    with pytest.raises(ConfigError, match="no such split"):
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
    assert run_train(options({"train.epochs": 1}))["reason"] == "epochs", "the folder of a run that never began can be used"
