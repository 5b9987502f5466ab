"""The benchmark of competition lets its busy programs run only where it says, and writes what it measured."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import competition
import psutil
import pytest
import torch

from pairclip_fast.config import RunConfig, load_preset, overlay

PATIENCE_S = 20.0


def until(program: psutil.Process, *, stopped: bool) -> None:
    """Wait until the program is held still, or runs."""
    ends = time.monotonic() + PATIENCE_S
    while (program.status() == psutil.STATUS_STOPPED) != stopped:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_busy_programs_compute_inside_and_only_there() -> None:
    with contextlib.closing(competition.BusyPrograms(1)) as programs:
        (program,) = psutil.Process().children()
        until(program, stopped=True)
        with programs.running():
            until(program, stopped=False)
        until(program, stopped=True)
    assert not psutil.pid_exists(program.pid)


def test_it_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def tiny(preset: str, *, batch_size: int | None, amp: bool) -> RunConfig:
        model = {"architecture": "vit", "width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
        return overlay(
            load_preset(preset), {"model": model, "train": {"device": "cpu", "amp": amp, "batch_size": batch_size or 40}}, where="test"
        )

    monkeypatch.setattr(competition, "configuration", tiny)
    monkeypatch.setattr(competition, "DATA_PAIRS", 64)
    assert competition.main(["--repeats", "2", "--batch-size", "32", "--json", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_bytes())
    assert [row["variant"] for row in record["rows"]] == ["ours", "autocast"]
    for row in record["rows"]:
        assert row["batch_size"] == 32
        assert row["beside_wall_s_low"] <= row["beside_wall_s"] <= row["beside_wall_s_high"]
        assert row["times_as_long"] == pytest.approx(row["beside_wall_s"] / row["alone_wall_s"])
    assert record["settings"]["threads"] == torch.get_num_threads()
    assert "times as long" in capsys.readouterr().out
    assert psutil.Process().children() == []
