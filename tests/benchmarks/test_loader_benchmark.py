"""The loaders' benchmark: it refuses wrong pictures before it times them, and its rows say what they are."""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from pathlib import Path

import loader as benchmark
import loader_peer_worker
import loader_peers
import loader_rows
import numpy as np
import pytest
import torch
from PIL import Image

from pairclip_fast.config import AugmentConfig
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loader-benchmark")
    rng = np.random.default_rng(0)
    for label in range(4):
        (root / "photos" / f"class {label}").mkdir(parents=True)
        for number in range(20):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            small.resize((32, 32), Image.Resampling.BICUBIC).save(root / "photos" / f"class {label}" / f"{number}.png")
    return benchmark.make_folders(root, path=root / "photos", pairs=256, events=EventLog(console=False))


@pytest.fixture
def events() -> EventLog:
    return EventLog(console=False)


def test_a_rung_of_ours_is_measured_and_told(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "make_folders", lambda *_, **__: folders)
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "SETTLE_SECONDS", 0.0)
    words = ["--pairs", "256", "--batch-size", "64", "--repeats", "1", "--ours-only", "--rung", "full"]
    assert benchmark.main([*words, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["rung"] for row in rows} == {"full"}
    assert rows.pop(0)["loader"] == "reading alone"
    assert {row["encoding"] for row in rows} == {"raw", "png", "jpeg"}
    assert all(row["unique_ids"] == [256, 256] and row["cpu_us_per_pair"] > 0.0 for row in rows)
    assert all(0 < row["state_bytes"] < 300 and row["resume_ms"] > 0.0 for row in rows)
    assert all(row["largest_difference"] <= 8.0 for row in rows)
    assert "ours: twin" in capsys.readouterr().out
    assert (tmp_path / "r.png").stat().st_size > 1_000


def test_wrong_pictures_are_not_timed(folders: dict[str, Path], events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loader_rows.Ours(backend="twin", threads=1)
    settings = {"encoding": "raw", "rung": "full", "batch_size": 64, "events": events}
    loader_rows.our_stream(ours, folders["raw"], **settings).close()
    monkeypatch.setattr(loader_rows, "FULL", dataclasses.replace(loader_rows.FULL, border="reflect"))
    with pytest.raises(NumericsError, match="other pictures"):
        loader_rows.our_stream(ours, folders["raw"], **settings)


def test_peers_must_do_the_work_of_their_rung() -> None:
    normal = torch.randn(8, 3, 32, 64)
    loader_peers.check_values(normal, name="x", rung="full", batch_size=8)
    for wrong in (normal[:4], normal.double(), normal * 255.0, normal + 1.0, normal.reshape(8, 3, 64, 32)):
        with pytest.raises(NumericsError, match="other work"):
            loader_peers.check_values(wrong, name="x", rung="full", batch_size=8)
    with pytest.raises(NumericsError):
        loader_peers.check_values(torch.zeros(8, 6144, dtype=torch.uint8), name="x", rung="read", batch_size=8)


@pytest.mark.parametrize("name", ["dali_batches", "webdataset_batches"])
def test_peers_of_this_environment_run(name: str, folders: dict[str, Path]) -> None:
    pytest.importorskip({"dali_batches": "nvidia.dali", "webdataset_batches": "webdataset"}[name])
    for rung in ("read", "normalise", "full"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset 1.0 leaves files to the garbage collector
            run_peer(name, folders["raw"], rung=rung)
            gc.collect()


def run_peer(name: str, folder: Path, *, rung: str) -> None:
    batches, close = getattr(loader_peers, name)(folder, encoding="raw", rung=rung, threads=8, batch_size=64)
    loader_peers.check_values(next(batches), name=name, rung=rung, batch_size=64)
    close()


def test_a_foreign_environment_says_what_it_lacks(folders: dict[str, Path], events: EventLog) -> None:
    pixels = loader_peer_worker.read_pixels(folders["raw"] / "train")
    assert pixels.shape == (256, 2, 32, 32, 3)

    def strangers(*_: object) -> object:
        return iter([torch.from_numpy(pixels[:64] ^ 1)] * 9)

    with pytest.raises(ValueError, match="64 of 64 samples"):
        loader_peer_worker.measure("x", strangers, pixels, "read", 64)  # type: ignore[arg-type]


def test_the_full_rung_is_all_of_the_specification() -> None:
    """So that no later default switches an operation of it off unnoticed."""
    expected = {"rotate_degrees": 15.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "flip_probability": 0.5}
    assert dataclasses.asdict(loader_rows.FULL) == dataclasses.asdict(AugmentConfig()) | expected
