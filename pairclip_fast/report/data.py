"""A run folder as plain values, whatever state the run left it in.

Nothing here trusts the folder: a report must also come out of a run that is going on, was killed in the middle of a
write, or was edited by hand. Each file that cannot be used is one entry in `Run.problems` and an absent value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from pairclip_fast.errors import ConfigError
from pairclip_fast.events import Event, last_attempts, read_events
from pairclip_fast.report.arrays import Arrays, read_arrays
from pairclip_fast.report.words import shown

LARGEST_NUMBER = 1e30
"""Axes overflow near the end of the float range; no quantity of ours comes near this."""
TEXT_FILE_LIMIT_BYTES = 64 << 20
LARGEST_STEP = 1 << 53
"""Whole numbers up to here are exact as float64."""
SPLITS = ("test", "val", "train")
"""In the order of how much a result on them says."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result on one split.

    Args:
        split: "test", "val" or "train".
        metrics: Contract keys to numbers (fractions, not per cent).
        arrays: Per-pair and per-class arrays, those that `arrays.read_arrays` let through.
        origin: The file or event it was taken from.
    """

    split: str
    metrics: dict[str, Any]
    arrays: Arrays
    origin: str

    def number(self, key: str) -> float:
        """Metric `key`, NaN if absent or not a number."""
        return number(self.metrics.get(key))

    @property
    def num_captions(self) -> int:
        """Size of the caption bank that was ranked, 0 if unknown."""
        value = self.number("num_captions")
        return int(value) if value >= 1 else 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds. Absent files are empty values.

    Args:
        name: The folder's name.
        events: The log without superseded measurements (see `events.last_attempts`).
        num_superseded: Measurements dropped because a resume went back before them.
        evaluations: By split, most telling first.
        problems: What could not be read, in words.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    manifest: dict[str, Any]
    bank: dict[str, str]
    events: list[Event]
    num_superseded: int
    evaluations: dict[str, Evaluation]
    problems: list[str]

    def measured(self, kind: str) -> list[Event]:
        """The events of one kind that name a step that a run can have reached."""
        return [event for event in self.of_kind(kind) if type(event.get("step")) is int and 0 <= event["step"] < LARGEST_STEP]

    def of_kind(self, kind: str) -> list[Event]:
        """The events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def plan(self) -> dict[str, Any]:
        """The plan of the latest attempt."""
        started = self.of_kind("run_started")
        plan = started[-1].get("plan") if started else None
        return plan if isinstance(plan, dict) else {}

    @property
    def finished(self) -> Event | None:
        """The `finished` event of the latest attempt; None while it is going on or after it was killed."""
        for event in reversed(self.events):
            if event["event"] == "finished":
                return event
            if event["event"] == "run_started":
                return None
        return None

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices; empty without a manifest."""
        names = self.manifest.get("class_names")
        return [str(name) for name in names] if isinstance(names, list) else []


def read_run(folder: Path) -> Run:
    """Everything the report needs from a run folder.

    Raises:
        ConfigError: `folder` is not a run folder (neither a config nor an event in it).
    """
    problems: list[str] = []
    config = _read_table(folder / "config.toml", problems)
    logged = _read_log(folder / "events.jsonl", problems)
    if not config and not logged:
        raise ConfigError(
            "not a run folder",
            where=folder,
            expected="config.toml and events.jsonl",
            got="neither, or both unreadable" if folder.exists() else "no such folder",
            fix="give the folder that `pairclip-fast train` printed, usually runs/<preset>-<time>",
        )
    events = last_attempts(logged)
    if not config:
        started = [event["config"] for event in events if event["event"] == "run_started" and isinstance(event.get("config"), dict)]
        config = started[-1] if started else {}
    return Run(
        name=folder.resolve().name,
        config=config,
        environment=_read_table(folder / "environment.json", problems),
        manifest=_read_table(folder / "manifest.json", problems),
        bank=_bank_metadata(folder / "captions.safetensors", problems),
        events=events,
        num_superseded=len(logged) - len(events),
        evaluations=_evaluations(folder / "evaluations", events, problems),
        problems=problems,
    )


def number(value: object) -> float:
    """`value` as a float; NaN for anything that is not a sensible number (JSON has null where a NaN was)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        result = float(value)
    except OverflowError:
        return math.nan
    return result if abs(result) < LARGEST_NUMBER else math.nan


def samples_by_step(run: Run) -> dict[int, float]:
    """Samples seen after each logged step."""
    return {event["step"]: number(event.get("samples_seen")) for event in run.measured("step")}


def samples_at(run: Run, steps: list[int]) -> np.ndarray:
    """Samples seen after `steps` (float64), between and beyond logged steps by the batch size.

    Evaluations and checkpoints know their step only; the steps of the log know both.
    """
    known = {step: samples for step, samples in samples_by_step(run).items() if math.isfinite(samples)}
    batch_size = number(run.config.get("train", {}).get("batch_size") if isinstance(run.config.get("train"), dict) else None)
    if not known:
        return np.asarray(steps, dtype=float) * (batch_size if math.isfinite(batch_size) else 1.0)
    at = np.array([0, *sorted(known)], dtype=float)
    samples = np.array([0.0, *(known[step] for step in sorted(known))])
    per_step = samples[-1] / at[-1] if at[-1] else 1.0
    inside = np.interp(steps, at, samples)
    return np.where(np.asarray(steps) > at[-1], np.asarray(steps) * per_step, inside)


def series(events: list[Event], *keys: str) -> np.ndarray:
    """The value at the path `keys` of each event, float64, NaN where absent."""
    values = []
    for event in events:
        value: Any = event
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(number(value))
    return np.array(values, dtype=float)


def _read_table(path: Path, problems: list[str]) -> dict[str, Any]:
    """A TOML or JSON object; empty if the file is absent or unusable."""
    try:
        if not path.exists():
            return {}
        if path.stat().st_size > TEXT_FILE_LIMIT_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes is too long")
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"expected a table, got {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {shown(error)}")
        return {}
    return value


def _read_log(path: Path, problems: list[str]) -> list[Event]:
    try:
        return read_events(path)
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {shown(error)}")
        return []


def _bank_metadata(path: Path, problems: list[str]) -> dict[str, str]:
    """The metadata of the caption bank's file (its encoder's name), without its features."""
    if not path.exists():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        problems.append(f"{path.name} cannot be read: {shown(error)}")
        return {}


def _evaluations(folder: Path, events: list[Event], problems: list[str]) -> dict[str, Evaluation]:
    """Files first; a split that has none yet takes the best (else the latest) evaluation event.

    Files of other names are results on other data, not the run's.
    """
    found: dict[str, Evaluation] = {}
    for split in SPLITS:
        path = folder / f"{split}.json"
        metrics = _read_table(path, problems)
        if metrics:
            arrays = read_arrays(path.with_suffix(".npz"), problems=problems)
            found[split] = Evaluation(split, metrics, arrays, f"evaluations/{path.name}")
    files, best = set(found), set()
    for event in events:
        split, result = str(event.get("split")), event.get("metrics")
        if event["event"] != "eval" or not isinstance(result, dict) or split in files:
            continue
        if event.get("best") or split not in best:
            found[split] = Evaluation(split, result, {}, f"step {shown(event.get('step'))}")
        if event.get("best"):
            best.add(split)
    order = {split: position for position, split in enumerate(SPLITS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
