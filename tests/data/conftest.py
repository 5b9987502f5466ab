"""Tiny sources and data folders: four classes of eight noise pictures, sharded in milliseconds."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.events import Event, EventLog

CLASSES = ("blue_whale", "crow", "dingo", "eel")
PER_CLASS = 8


class RecordingLog(EventLog):
    """A silent event log that remembers."""

    def __init__(self) -> None:
        super().__init__(console=False)
        self.events: list[Event] = []
        self.subscribe(self.events.append)

    def messages(self) -> str:
        return "\n".join(str(event) for event in self.events)


@pytest.fixture
def events() -> RecordingLog:
    return RecordingLog()


def noise_picture(seed: int, *, width: int = 32, height: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_bytes(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Bytes of an image file of a picture (array or Pillow image)."""
    return file_bytes


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """A noise picture by seed."""
    return noise_picture


def fill_photo_folder(folder: Path, *, first_seed: int = 0, per_class: int = PER_CLASS) -> Path:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            seed = first_seed + label * 1000 + number
            (folder / name / f"{number:03d}.png").write_bytes(file_bytes(noise_picture(seed)))
    return folder


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """An image folder that the test may change."""
    return fill_photo_folder(tmp_path / "photos")


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """Further image folders: name, first_seed, per_class."""
    return lambda name, **options: fill_photo_folder(tmp_path / name, **options)


@pytest.fixture
def shard(photo_folder: Path, tmp_path: Path, events: RecordingLog) -> Callable[..., dict[str, Any]]:
    """Run `shard` on the image folder; keywords replace options, `fs` goes to the file system."""

    def run(*, fs: Any = None, **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"source": "imagefolder", "path": photo_folder, "out": tmp_path / "data", "shard_size": 10} | options
        extra = {} if fs is None else {"fs": fs}
        return run_shard(ShardOptions(**settings), events, **extra)

    return run


@pytest.fixture(scope="session")
def _data_originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("small-data")
    photos = fill_photo_folder(root / "photos")
    test = fill_photo_folder(root / "test", first_seed=500, per_class=3)
    made = {}
    for encoding in ("raw", "png", "jpeg"):
        options = ShardOptions(
            source="imagefolder",
            path=photos,
            test_path=test,
            out=root / encoding,
            shard_size=10,
            val_fraction=0.25,
            num_pairs=33,
            encoding=encoding,
        )
        run_shard(options, EventLog(console=False))
        made[encoding] = root / encoding
    return made


@pytest.fixture
def data_copy(_data_originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a small data folder (33 train pairs in 4 shards, 8 val, 12 test) in the given encoding."""

    def copy(encoding: str = "raw") -> Path:
        return Path(shutil.copytree(_data_originals[encoding], tmp_path / f"copy-{encoding}"))

    return copy


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file (and folder) below, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """The content of a folder, to compare."""
    return snapshot
