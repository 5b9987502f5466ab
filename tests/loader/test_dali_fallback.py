"""`--loader auto` on a GPU takes DALI if it makes the pictures that torch makes; here with DALI's pipeline on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import loader
from pairclip_fast.data.backends.executor import Executor
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.events import EventLog

dali = pytest.importorskip("pairclip_fast.data.backends.dali")

FULL = AugmentConfig(rotate_degrees=25.0, brightness=0.4, contrast=0.3, saturation=0.6, flip_probability=0.3, shift_pixels=4, cutout_size=7)
AUGMENTS = {
    "nothing": None,
    "everything": FULL,
    "mirrored": AugmentConfig(flip_probability=0.5, alternating_flip=True, shift_pixels=3, border="reflect", pairing="resampled"),
}


def chosen(folder: Path, events: EventLog, augment: AugmentConfig | None = FULL) -> Executor:
    with ShardReader(folder, "train") as reader:
        settings = {"batch_size": 8, "device": torch.device("cpu"), "num_threads": 1}
        executor = loader.dali_or_resident(reader, augment=augment, events=events, **settings)  # type: ignore[arg-type]
        executor.close()
    return executor


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_what_makes_the_right_pictures_is_taken(encoding: str, augment: str, folders: dict[str, Path], events: EventLog) -> None:
    assert chosen(folders[encoding], events, AUGMENTS[augment]).name == "dali"
    assert events.fallbacks == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda *_: torch.zeros(8, 3, 32, 64), "it makes other pictures than torch"),
        (lambda *_: torch.full((8, 3, 32, 64), torch.nan), "other pictures than torch (nan of 255 apart)"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["other", "nan", "error"],
)
def test_what_does_not_is_replaced_with_one_event(
    broken: Callable[..., Tensor], reason: str, folders: dict[str, Path], events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali.DaliExecutor, "fill", broken)
    assert chosen(folders["raw"], events).name == "reference"
    mine = [event for event in events.fallbacks if event["what"] == "DALI loader"]
    assert len(mine) == 1
    assert reason in mine[0]["reason"]


def test_a_library_that_does_not_load_is_replaced_too(folders: dict[str, Path], events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def unbuildable(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available for execution\n on the device")

    monkeypatch.setattr(dali, "make_pipeline", unbuildable)
    assert chosen(folders["raw"], events).name == "reference"
    assert events.fallbacks[0]["reason"] == "RuntimeError: no kernel image is available for execution on the device"


def test_a_small_difference_of_colour_is_noticed(folders: dict[str, Path], events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    make, slightly = dali.parameter_feed, 0.01

    def wrong(spec: object, sources: np.ndarray, table: np.ndarray) -> dict[str, object]:
        feed: dict[str, object] = make(spec, sources, table)
        return feed | {name: value * (1 + slightly) for name, value in feed.items() if name.startswith("colour")}  # type: ignore[operator]

    monkeypatch.setattr(dali, "parameter_feed", wrong)
    assert chosen(folders["raw"], events).name == "reference"


@pytest.mark.parametrize("bad", [1, 16], ids=["the first", "all that are tried"])
def test_a_bad_record_is_no_fault_of_dali(
    bad: int, make_folder: Callable[..., Path], pixels: np.ndarray, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are compared; a wrong picture is noticed all the same."""
    folder = make_folder(pixels[:20])
    with ShardReader(folder, "train") as reader:
        path, offsets = reader.shard_paths[0], reader.records.offsets[:bad].tolist()
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset + 100] ^= 4
    path.write_bytes(data)
    assert chosen(folder, events).name == "dali"
    assert events.fallbacks == []
    if bad == 1:
        monkeypatch.setattr(dali.DaliExecutor, "fill", lambda *_: torch.zeros(8, 3, 32, 64))
        assert chosen(folder, events).name == "reference"
