"""The kernel of the resident loader in Triton's interpreter: parameters bit for bit, pictures against the float64 oracle.

`TRITON_INTERPRET=1` must be set before triton is imported, so this file runs in a process of its own, started by
`test_resident.py`; its name does not match pytest's pattern, and a plain run does not collect it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import no_type_check

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from augment_oracle import MEAN, STD, oracle

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends import resident, selfcheck, triton_tiles
from pairclip_fast.data.backends.reference import ReferenceExecutor
from pairclip_fast.data.bad_records import BadRecords
from pairclip_fast.data.loader import PlannedLoader
from pairclip_fast.data.parameters import PARTNER, Draw, own_tiles
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.events import EventLog

assert os.environ.get("TRITON_INTERPRET") == "1"

CPU = torch.device("cpu")
FULL = AugmentConfig(rotate_degrees=25.0, brightness=0.4, contrast=0.3, saturation=0.6, flip_probability=0.3, shift_pixels=4, cutout_size=7)
CONFIGS = {
    "nothing": AugmentConfig(),
    "everything": FULL,
    "everything, mirrored": dataclasses.replace(FULL, border="reflect", flip_probability=0.5, alternating_flip=True),
    "flip and shift": AugmentConfig(flip_probability=0.5, shift_pixels=3),
    "shift, mirrored": AugmentConfig(shift_pixels=16, border="reflect"),
    "colour": AugmentConfig(brightness=0.5),
    "rotation": AugmentConfig(rotate_degrees=180.0),
    "cutout": AugmentConfig(cutout_size=40),
}
TOLERANCE = 0.02


@triton.jit
@no_type_check
def record(
    samples, sources, table, seed, epoch, STREAMS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ANGLE: tl.constexpr, BRIGHTNESS: tl.constexpr, CONTRAST: tl.constexpr, SATURATION: tl.constexpr,
    FLIP: tl.constexpr, ALTERNATES: tl.constexpr, SHIFT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Write down the parameters that the kernel draws, for 8 samples of two tiles at once."""
    number = tl.arange(0, 16)
    tile, sample, source, epoch = number % 2, tl.load(samples + number // 2), tl.load(sources + number), tl.to_tensor(epoch)
    angle, brightness, contrast, saturation = triton_tiles.colour_parameters(
        seed, epoch, sample, tile, STREAMS, ANGLE, BRIGHTNESS, CONTRAST, SATURATION
    )
    flip, shift_x, shift_y = triton_tiles.geometry_parameters(seed, epoch, sample, tile, source, 2, STREAMS, FLIP, ALTERNATES, SHIFT)
    cut_x, cut_y = triton_tiles.cut_parameters(seed, epoch, sample, tile, STREAMS, HEIGHT, WIDTH, CUT)
    row = table + number * 10
    tl.store(row, angle)
    tl.store(row + 1, brightness)
    tl.store(row + 2, contrast)
    tl.store(row + 3, saturation)
    tl.store(row + 4, flip.to(tl.float32))
    tl.store(row + 5, shift_x.to(tl.float32))
    tl.store(row + 6, shift_y.to(tl.float32))
    tl.store(row + 7, cut_x.to(tl.float32))
    tl.store(row + 8, cut_y.to(tl.float32))
    tl.store(row + 9, number * 0.0 + CUT)


@pytest.mark.parametrize(("alternating", "partner"), [(False, False), (True, True)])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**63 - 1])
def test_parameters_are_numpys_bit_for_bit(seed: int, alternating: bool, partner: bool) -> None:
    augment = dataclasses.replace(FULL, flip_probability=0.5, alternating_flip=alternating)
    ids = np.array([0, 1, 2, 12_345, 99_999, 2**31 - 1, 2**31 + 5, 2**32 - 1])
    sources = np.concatenate([np.arange(12), [100_000, 2**31, 2**32, 2**33 - 1]]).reshape(8, 2)
    for epoch in (3, 2**20):
        draw = Draw(ids=ids, sources=sources, tile_size=(24, 40), seed=seed, epoch=epoch, augment=augment, partner=partner)
        table = torch.zeros(8, 2, 10)
        record[(1,)](
            torch.from_numpy(ids), torch.from_numpy(sources), table, seed, epoch, PARTNER * partner, 24, 40,
            augment.rotate_degrees, augment.brightness, augment.contrast, augment.saturation,
            augment.flip_probability, alternating, augment.shift_pixels, augment.cutout_size,
        )  # fmt: skip
        assert np.array_equal(table.numpy(), draw.table())


@pytest.mark.parametrize(
    ("name", "shape", "partner"),
    [(name, (2, 12, 17), False) for name in CONFIGS]
    + [("everything, mirrored", (1, 40, 33), True), ("everything", (3, 16, 16), True)],  # 40 x 33 pixels are more than one block
)
def test_pictures_equal_the_oracle(name: str, shape: tuple[int, int, int], partner: bool) -> None:
    (tiles, height, width), augment = shape, CONFIGS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (5 * tiles, height, width, 3), dtype=np.uint8)
    rows = 2 if partner else 1  # a program takes the interpreter 50 ms and more
    sources, ids = np.random.default_rng(1).integers(0, 5 * tiles, (rows, tiles)), np.array([3, 4])[:rows]
    draw = Draw(ids=ids, sources=sources, tile_size=(height, width), seed=5, epoch=2, augment=augment, partner=partner)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    where = {"epoch": 2, "seed": 5, "partner": partner, "augment": augment, "mean": MEAN, "std": STD}
    images = triton_tiles.augment_resident(planes, torch.from_numpy(sources), torch.from_numpy(ids), **where)  # type: ignore[arg-type]
    values = images.permute(0, 2, 3, 1).numpy().astype(np.float64) * np.array(STD) + np.array(MEAN)
    assert abs(values - oracle(pixels[sources], draw.table(), border=augment.border)).max() < TOLERANCE


@pytest.fixture
def events() -> Iterator[EventLog]:
    log = EventLog(None, console=False)
    yield log
    log.close()


MIXED = AugmentConfig(
    flip_probability=0.3,
    shift_pixels=4,
    border="reflect",
    cutout_size=7,
    swap_probability=0.5,
    pairing="resampled",
    mix="cutmix",
    mix_probability=0.5,
)


@pytest.fixture
def folder(make_folder: Callable[..., Path], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few and small pictures, and a short self-check: the interpreter takes long."""
    monkeypatch.setattr(selfcheck, "SAMPLES", 4)
    monkeypatch.setattr(selfcheck, "EPOCHS", (3,))
    return make_folder(pixels[:7, :, 8:20, 8:20])


def test_a_whole_epoch_is_that_of_the_reference(folder: Path, events: EventLog) -> None:
    loaders = []
    for make in (ReferenceExecutor, resident.resident_executor):
        reader = ShardReader(folder, "train")
        executor = make(reader, augment=MIXED, device=CPU, events=events)
        plan = Plan(num_samples=len(reader), batch_size=4, seed=5, drop_last=False)
        bad_records = BadRecords(reader, policy="raise", events=events)
        loaders.append(PlannedLoader(executor, reader=reader, plan=plan, augment=MIXED, device=CPU, bad_records=bad_records))
    assert [loader.backend for loader in loaders] == ["reference", "resident"]
    assert events.fallbacks == []
    spread = torch.tensor(STD).view(3, 1, 1)
    for first, second in zip(*loaders, strict=True):
        assert torch.equal(first.caption_ids, second.caption_ids)
        assert ((first.images - second.images).abs() * spread).max() < TOLERANCE
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("change", [{"border": "zero"}, {"cutout_size": 6}, {"flip_probability": 0.9}], ids=str)
def test_a_kernel_that_makes_other_pictures_is_not_used(
    change: dict[str, object], folder: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = triton_tiles.compile_time

    def wrong(augment: AugmentConfig, **sizes: object) -> dict[str, object]:
        return right(dataclasses.replace(augment, **change), **sizes)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_tiles, "compile_time", wrong)
    with ShardReader(folder, "train") as reader:
        executor = resident.resident_executor(reader, augment=MIXED, device=CPU, events=events)
    assert executor.name == "reference"
    (event,) = events.fallbacks
    assert "other pictures" in event["reason"]


def test_an_empty_batch(folder: Path, events: EventLog) -> None:
    with ShardReader(folder, "train") as reader:
        executor = resident.ResidentExecutor(ReferenceExecutor(reader, augment=FULL, device=CPU, events=events))
    none = np.zeros(0, dtype=np.int64)
    draw = Draw(ids=none, sources=own_tiles(none, tiles=2), tile_size=(12, 12), seed=0, epoch=0, augment=FULL)
    assert executor.fill_drawn(draw).shape == (0, 3, 12, 24)
