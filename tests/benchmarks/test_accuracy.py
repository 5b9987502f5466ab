"""The accuracy benchmark reports what the runs logged, goes on where it was stopped, and repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accuracy
import pytest

from pairclip_fast.config import load_preset, overlay, read_toml
from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.sources import shapes
from pairclip_fast.events import EventLog, read_events
from pairclip_fast.text.bank import bank_for

ABLATIONS = Path(accuracy.__file__).with_name("ablations.toml")
CONFIG = """
[model]
architecture = "tile_conv"
width = 4
[bank]
rank = 8
[train]
batch_size = 64
device = "cpu"
"""


def test_curves_are_those_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 400)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 100)
    quiet = EventLog(console=False)
    manifest_folder = tmp_path / "data"
    run_shard(ShardOptions(source="shapes", out=manifest_folder, num_pairs=128), events=quiet)
    bank_for(manifest_folder, accuracy.read_manifest(manifest_folder), text_encoder="hashed", events=quiet)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    places = ["--data", str(manifest_folder), "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "record.json")]
    words = [*places, "--config", str(tmp_path / "tiny.toml"), "--epochs", "2", "--seed", "3", "4"]
    assert accuracy.main(words) == 0
    assert "2" in capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [3, 4]
    log = read_events(tmp_path / "runs" / "fast-seed3" / "events.jsonl")
    evals = [event for event in log if event["event"] == "eval"]
    curve = rows[0]["curve"]
    assert [point["top100"] for point in curve] == [event["metrics"]["top100"] for event in evals]
    assert [point["samples_seen"] for point in curve] == [128, 256]
    for point in curve:
        of_epoch = [event["loss"] for event in log if event["event"] == "step" and event["epoch"] == point["epoch"] - 1]
        assert point.get("train_loss") == (pytest.approx(sum(of_epoch) / len(of_epoch)) if of_epoch else None)
    assert any("train_loss" in point for point in curve)
    assert curve[-1]["pflop"] == pytest.approx([event for event in log if event["event"] == "finished"][-1]["pflop"])

    assert accuracy.main(words) == 0
    assert read_events(tmp_path / "runs" / "fast-seed3" / "events.jsonl") == log, "an ended run is only read"


def test_variants_are_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 400)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 100)
    data = tmp_path / "data"
    run_shard(ShardOptions(source="shapes", out=data, num_pairs=128), events=EventLog(console=False))
    bank_for(data, accuracy.read_manifest(data), text_encoder="hashed", events=EventLog(console=False))
    (tmp_path / "tiny.toml").write_text(CONFIG)
    (tmp_path / "variants.toml").write_text("[unchanged]\n[short]\nbank = { rank = 4 }\n[other]\nnonsense = 1\n")
    words = ["--data", str(data), "--out", str(tmp_path / "runs"), "--config", str(tmp_path / "tiny.toml"), "--epochs", "1"]
    words += ["--variants", str(tmp_path / "variants.toml"), "--json", str(tmp_path / "record.json"), "--plot", str(tmp_path / "plot.svg")]
    assert accuracy.main([*words, "--variant", "unchanged", "short"]) == 0
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [(row["variant"], row["config"]["bank"]["rank"], row["config"]["model"]["width"]) for row in rows] == [
        ("unchanged", 8, 4),
        ("short", 4, 4),
    ]
    assert "fast short" in capsys.readouterr().out
    assert b"fast unchanged" in (tmp_path / "plot.svg").read_bytes()
    assert accuracy.main([*words, "--variant", "shorter"]) == 2
    assert "shorter" in capsys.readouterr().err


@pytest.mark.parametrize("name", read_toml(ABLATIONS))
def test_every_ablation_changes_the_preset_and_nothing_is_misspelt(name: str) -> None:
    preset = load_preset("fast")
    changed = overlay(preset, read_toml(ABLATIONS)[name], where=name)
    assert (changed == preset) == (name == "unchanged")


def test_spread_needs_more_than_one_value() -> None:
    assert accuracy.spread([0.25]) == "25.00 %"
    assert accuracy.spread([0.2, 0.3]) == "25.00 +- 7.07 %"


def test_a_missing_data_folder_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "runs")]) == 2
    assert "nothing" in capsys.readouterr().err
