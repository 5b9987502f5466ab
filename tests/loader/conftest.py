"""Small data folders with pictures made for the purpose, written with the real writer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_backend import BACKENDS, CPU, FULL, Open, make_named_loader, skip_if_absent

from pairclip_fast.data.loader import Loader
from pairclip_fast.data.manifest import Manifest, SplitManifest, SplitProof, write_manifest
from pairclip_fast.data.writer import ShardFormat, write_split
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL

MEAN = (125.0, 120.0, 110.0)
STD = (60.0, 61.0, 65.0)
MakeFolder = Callable[..., Path]


@dataclasses.dataclass
class Samples:
    """A `SampleSource` over an array of tiles; caption ids run through the nine captions of three classes."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def tiles(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def facts(self, index: int) -> dict[str, Any]:
        return {"caption_id": index * 5 % 9}

    def caption(self, index: int) -> str:
        return f"caption {index * 5 % 9}"


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """A function that writes tiles [n, t, h, w, 3] as the train split of a data folder."""
    numbers = itertools.count()

    def make(pixels: np.ndarray, *, encoding: str = "raw", shard_size: int = 40) -> Path:
        folder = tmp_path_factory.mktemp(f"data{next(numbers)}")
        shards = write_split(
            folder / "train", Samples(pixels), ShardFormat(encoding=encoding, shard_size=shard_size), fs=REAL, advance=_ignore
        )
        count = len(pixels)
        split = SplitManifest(count=count, images=count, used_images=count, ids_sha256="", contents_sha256="", shards=shards)
        manifest = Manifest(
            format=1,
            source="made",
            description="made",
            class_names=("a", "b", "c"),
            template="{left} {right}",
            seed=0,
            encoding=encoding,
            tiles=pixels.shape[1],
            tile_height=pixels.shape[2],
            tile_width=pixels.shape[3],
            mean=MEAN,
            std=STD,
            splits={"train": split},
            split_proof=SplitProof(shared_ids=0, shared_contents_train_val=0, duplicate_images=0, test_contents_in_train=0),
            arguments={},
        )
        write_manifest(folder, manifest)
        return folder

    return make


def _ignore(count: int) -> None:
    pass


def smooth_pixels(count: int, *, tiles: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Pictures with structure at a scale of a few pixels, using the whole range 0..255."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (count * tiles, 8, 8, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)) for picture in small]
    return np.stack(large).reshape(count, tiles, height, width, 3)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """103 samples: a prime, so that no batch or rank count divides it."""
    return smooth_pixels(103)


@pytest.fixture(scope="session")
def folders(make_folder: MakeFolder, pixels: np.ndarray) -> dict[str, Path]:
    """The same pictures in every encoding."""
    return {encoding: make_folder(pixels, encoding=encoding) for encoding in ("raw", "png", "jpeg")}


@pytest.fixture
def events() -> Iterator[EventLog]:
    log = EventLog(None, console=False)
    yield log
    log.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_if_absent(request.param)
    return str(request.param)


@pytest.fixture
def open_loader(folders: dict[str, Path], events: EventLog) -> Iterator[Open]:
    """A function that makes a loader over the 103 samples; all are closed at the end."""
    opened: list[Loader] = []

    def make(backend: str, *, encoding: str = "raw", folder: Path | None = None, **options: object) -> Loader:
        settings = {"split": "train", "batch_size": 16, "augment": FULL, "seed": 5, "device": CPU, "drop_last": False, **options}
        opened.append(make_named_loader(folder or folders[encoding], backend=backend, events=events, **settings))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()
