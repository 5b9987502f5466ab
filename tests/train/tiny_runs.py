"""Whole runs of the tiny configuration: what acts on them at a step, and what of two runs must be equal."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairclip_fast.events import Event, EventLog, read_events
from pairclip_fast.telemetry import timing
from pairclip_fast.train import planning, probing
from pairclip_fast.train.options import TrainOptions

STEPS = 12
"""Of the tiny configuration."""
Options = Callable[..., TrainOptions]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is an event; nothing is measured that the test does not need."""
    monkeypatch.setattr(timing, "STEP_EVENT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_MATRIX", 64)
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(planning, "training_flops_per_pair", lambda *_, **__: 1e6)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved any more."""


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
