"""A tiny data folder and a tiny configuration."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Options, hurry

from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.events import Event, EventLog
from pairclip_fast.text.bank import bank_for
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions

CONFIG = """
[model]
architecture = "vit"
width = 16
depth = 1
heads = 2
mlp_width = 16
patch_size = 16
[bank]
rank = 8
[augment]
flip_probability = 0.5
shift_pixels = 2
[optimizer]
lr = 0.01
ema_decay = 0.9
warmup_epochs = 0.5
[train]
epochs = 3
batch_size = 16
device = "cpu"
loader = "reference"
"""
"""Three epochs of four steps."""


@pytest.fixture
def events() -> Iterator[EventLog]:
    log = EventLog(None, console=False)
    yield log
    log.close()


@pytest.fixture
def recorded(events: EventLog) -> list[Event]:
    """Everything that goes through `events`."""
    found: list[Event] = []
    events.subscribe(found.append)
    return found


@pytest.fixture(scope="session")
def data_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 training and 24 validation pairs of four classes of noisy colours, made by the real `shard`; test pairs as well."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 6)):
        for number, name in enumerate(("red thing", "green thing", "blue thing", "grey thing")):
            path = folder / part / name
            path.mkdir(parents=True)
            colour = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]][number])
            for index in range(count):
                pixels = np.clip(colour + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / f"{part}-{name}-{index:03d}.png")
    out = folder / "data"
    options = ShardOptions(
        source="imagefolder",
        path=folder / "train",
        test_path=folder / "test",
        out=out,
        num_pairs=70,
        val_fraction=0.2,
    )
    log = EventLog(None, console=False)
    run_shard(options, log)
    bank_for(out, read_manifest(out), text_encoder="hashed", events=log)
    return out


@pytest.fixture
def data(data_template: Path, tmp_path: Path) -> Path:
    """A copy of the data folder that the test may write to."""
    shutil.copytree(data_template, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="session")
def write_config() -> Callable[..., Path]:
    """Write the tiny configuration with changes (`{"train.epochs": 2}`) to a TOML file in a folder."""
    import tomllib

    import tomli_w

    def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
        tables = tomllib.loads(CONFIG)
        for key, value in (changes or {}).items():
            table, _, field = key.partition(".")
            tables.setdefault(table, {})[field] = value
        if tables["model"]["architecture"] != "vit":
            tables["model"] = {name: value for name, value in tables["model"].items() if name in ("architecture", "width")}
        text = tomli_w.dumps(tables)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
        if not path.exists():
            path.write_text(text)
        return path

    return write


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
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


PROGRAM = """
import sys
from pairclip_fast.cli import main
from pairclip_fast.train import probing
probing.PROBE_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads of one step wait for each other; on a busy machine that takes most of the time."""


@pytest.fixture
def train_alone() -> Callable[..., str]:
    """Run `pairclip-fast train` in a process of its own, as memory belongs to processes; what it said."""

    def run(*arguments: str) -> str:
        command, environment = [sys.executable, "-c", PROGRAM, "train", *arguments], os.environ | ONE_THREAD
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=150)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run
