"""Run folders: which one a command means, what identifies the run in it, and the record of where it ran. No torch here.

run/ config.toml environment.json events.jsonl captions.safetensors manifest.json run.lock checkpoints/ evaluations/
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
import tomllib
from pathlib import Path
from typing import Any

from pairclip_fast import __version__
from pairclip_fast.config import RunConfig, load_preset, overlay, read_toml, to_toml
from pairclip_fast.data.places import default_folder
from pairclip_fast.errors import CheckpointError, ConfigError, printable
from pairclip_fast.events import EventLog, read_events
from pairclip_fast.storage import FolderLock, storage_errors, write_atomic, write_json
from pairclip_fast.telemetry.machine import cpu_model, git_commit, package_versions
from pairclip_fast.train.options import DEFAULT_RUNS, TrainOptions, budget_bytes, resolve_config

CONFIG, ENVIRONMENT, EVENTS, LOCK = "config.toml", "environment.json", "events.jsonl", "run.lock"
BEGUN = (LOCK, EVENTS)
"""All that a first start leaves which fails before the run is set up: the next one may use the folder."""
RECOMPUTE = "train.recompute"
PLACEMENT_FIELDS = ("train.device", "train.compile", RECOMPUTE, "train.loader", "train.save_minutes", "train.tensorboard")
"""May change on resume: they say where and how the same training is computed. Every other field decides the result."""
PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "transformers", "webdataset", "nvidia-dali-cuda130", "triton")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The run folder and configuration that the options stand for."""

    folder: Path
    config: RunConfig
    data: Path
    resumes: bool
    """The folder holds a run already."""

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "config": to_toml(self.config), "data": str(self.data), "resumes": self.resumes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Chosen:
        config = overlay(RunConfig(), tomllib.loads(value["config"]), where="the first process")
        return cls(folder=Path(value["folder"]), config=config, data=Path(value["data"]), resumes=value["resumes"])


def choose(options: TrainOptions) -> Chosen:
    """The run that the options mean; nothing is written.

    `--resume` without a run in `--out` starts one: a job that is requeued keeps one command line.

    Raises:
        ConfigError: bad configuration; a folder with something in it and no `--resume`; `--resume` without any run; a
            configuration that differs from the one the run was started with.
        StorageError: the run folder cannot be looked into.
    """
    budget_bytes(options)  # a wrong one is answered before anything is looked for
    folder = options.out if options.out is not None else (_newest_run(options) if options.resume else None)
    if folder is None:
        config = resolve_config(options)
        return Chosen(_new_name(config), config, options.data or default_folder(), resumes=False)
    with storage_errors(folder):  # it may be one that we may not look into
        is_run = (folder / CONFIG).is_file()
        is_free = not folder.exists() or (folder.is_dir() and all(entry.name in BEGUN for entry in folder.iterdir()))
    if options.resume and is_run:
        config = _resumed_config(folder, options)
        return Chosen(folder, config, options.data or recorded_data(folder), resumes=True)
    if not is_free:
        fix = "continue it with --resume, or choose another --out" if is_run else "choose another --out"
        if is_run and not options.dry_run:
            FolderLock(folder).release()  # a run that is going on is a clearer answer than a folder that is not empty
        raise ConfigError("the run folder is not empty", where=folder, fix=fix)
    return Chosen(folder, resolve_config(options), options.data or default_folder(), resumes=False)


def stored_config(folder: Path) -> RunConfig:
    """The configuration a run was started with.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            "this is not a run folder", where=path, fix="name the folder that `pairclip-fast train` made, runs/<preset>-<time>"
        )
    return overlay(RunConfig(), read_toml(path), where=str(path))


def recorded_data(folder: Path) -> Path:
    """The data folder that a run was trained on.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    path = folder / ENVIRONMENT
    try:
        return Path(json.loads(path.read_bytes())["data"]["folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the run does not say which data it used", where=path, got=error, fix="name the folder with --data"
        ) from error


def differences(before: dict[str, Any], after: dict[str, Any], *, prefix: str = "") -> list[str]:
    """`field: before -> after` for each field that differs, in nested tables."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, prefix=f"{prefix}{key}.")
        elif _plain(old) != _plain(new):
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def decisive_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Those of the differences that change the result."""
    return [line for line in differences(before, after) if line.partition(":")[0].removeprefix("config.") not in PLACEMENT_FIELDS]


def refuse_differences(before: dict[str, Any], after: dict[str, Any], *, where: object) -> None:
    """Raise a `ConfigError` that names what a resumed run would do differently; placement may differ.

    Raises:
        ConfigError: see above.
    """
    lines = decisive_differences(before, after)
    if lines:
        raise ConfigError(
            "the run was started differently",
            where=where,
            got="; ".join(printable(line, limit=200) for line in lines[:20]),
            fix="resume without these changes, or start a new run",
        )


def next_attempt(folder: Path) -> int:
    """Number of the attempt that begins now; the first is 1."""
    attempts = [event.get("attempt") for event in read_events(folder / EVENTS)]
    return 1 + max((number for number in attempts if isinstance(number, int)), default=0)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the run's configuration."""
    write_atomic(folder / CONFIG, to_toml(config).encode())


def write_environment(folder: Path, *, facts: dict[str, Any], events: EventLog) -> None:
    """Write where the run runs: versions, machine, the code's commit, the data, and the fallbacks taken so far."""
    record = {
        "pairclip_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "packages": package_versions(PACKAGES),
        "git_commit": git_commit(),
        "fallbacks": events.fallbacks,
    }
    write_json(folder / ENVIRONMENT, record | facts)


def _resumed_config(folder: Path, options: TrainOptions) -> RunConfig:
    """The stored configuration, placed as the options say, if they mean this run.

    They do if they would start it again, as those of a job that is requeued do, and if they change nothing in what is stored.
    """
    stored = stored_config(folder)
    before = dataclasses.asdict(stored)
    if not _would_start(stored, options):
        refuse_differences(before, _asked(options, stored=stored, base=stored), where=folder)
    kept = () if options.memory_budget is None else (RECOMPUTE,)
    return resolve_config(options, base=stored, only=set(PLACEMENT_FIELDS).difference(kept))


def _would_start(stored: RunConfig, options: TrainOptions) -> bool:
    """Whether the options, without a run to resume, mean the stored configuration."""
    try:
        return not decisive_differences(dataclasses.asdict(stored), _asked(options, stored=stored, base=None))
    except ConfigError:  # they may leave the preset to the run
        return False


def _asked(options: TrainOptions, *, stored: RunConfig, base: RunConfig | None) -> dict[str, Any]:
    """The configuration that the options ask for, but for the pieces into which a memory budget has cut the stored run's batches."""
    tables = dataclasses.asdict(resolve_config(options, base=base))
    if options.memory_budget is not None and stored.optimizer.accumulate % tables["optimizer"]["accumulate"] == 0:
        tables["optimizer"]["accumulate"] = stored.optimizer.accumulate
    return tables


def _newest_run(options: TrainOptions) -> Path:
    """The run under runs/ that was active last, of the preset if one is given."""
    if options.preset is not None:
        load_preset(options.preset)  # an unknown name is the likelier mistake
    runs: list[tuple[float, Path]] = []
    for path in sorted(DEFAULT_RUNS.glob(f"*/{CONFIG}")):
        if options.preset is None or read_toml(path).get("preset") == options.preset:
            log = path.with_name(EVENTS)
            runs.append((log.stat().st_mtime if log.exists() else 0.0, path.parent))
    if not runs:
        what = "there is no run to resume" if options.preset is None else f"there is no run of preset {options.preset} to resume"
        raise ConfigError(what, where=DEFAULT_RUNS, fix="name its folder with --out, or start without --resume")
    return max(runs)[1]


def _new_name(config: RunConfig) -> Path:
    base = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(base).name != base:
        raise ConfigError("a preset's name cannot be a path", where="preset", got=config.preset)
    name, number = base, 2
    while (DEFAULT_RUNS / name).exists():
        name, number = f"{base}-{number}", number + 1
    return DEFAULT_RUNS / name


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON and TOML give them back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
