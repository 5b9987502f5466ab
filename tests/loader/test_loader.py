"""What the loader promises for every backend: the same stream, each sample once, and errors that say what and where."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_oracle import oracle
from every_backend import CPU, FAST, FULL, MEAN, STD, Open, assert_same, by_id, skip_if_absent
from test_augment import FULL as STRONG
from test_augment import WRONG, WRONG_BORDERS

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import loader as loader_module
from pairclip_fast.data.augment import Border
from pairclip_fast.data.backends.pictures import usable_threads
from pairclip_fast.data.backends.raw_tiles import RawTiles
from pairclip_fast.data.loader import Loader, choose_backend
from pairclip_fast.data.parameters import own_tiles, parameter_table, parameter_table_in_numpy
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import ConfigError, DataError, EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.native import Native


def test_batches_are_what_the_contract_says(backend: str, open_loader: Open, folders: dict[str, Path]) -> None:
    loader = open_loader(backend)
    batches = list(loader)
    assert len(loader) == len(batches) == 7
    with ShardReader(folders["raw"], "train") as reader:
        captions = torch.from_numpy(reader.caption_ids)
    for step, batch in enumerate(batches):
        assert (batch.epoch, batch.step) == (0, step)
        assert batch.images.shape == (16, 3, 32, 64)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert torch.equal(batch.caption_ids, captions[batch.sample_ids])
        assert (batch.caption_ids.dtype, batch.sample_ids.dtype, batch.valid.dtype) == (torch.int64, torch.int64, torch.bool)
    assert [int(batch.valid.sum()) for batch in batches] == [16] * 6 + [7]
    assert loader.stats.batches == 7
    assert loader.stats.samples == 103
    assert loader.stats.bytes_read >= 103 * 6144
    assert loader.stats.fill_s > 0.0
    assert loader.stats.wait_s > 0.0


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("augment", [None, FAST, FULL], ids=["nothing", "flip and shift", "everything"])
@pytest.mark.parametrize("other", ["native", "twin", "dali"])
def test_backends_deliver_the_same_stream(other: str, encoding: str, augment: AugmentConfig | None, open_loader: Open) -> None:
    skip_if_absent(other)
    loaders = [open_loader(backend, encoding=encoding, augment=augment) for backend in ("reference", other)]
    # The design allows DALI 0.25; the graph does better, except that JPEG decoders may differ by a rounding.
    tolerance = {"native": 0.02, "twin": 0.0, "dali": 0.05}[other]
    if encoding == "jpeg" and other != "twin":
        tolerance = 1.5
    for _ in range(2):
        for first, second in zip(*loaders, strict=True):
            assert_same(first, second, tolerance=tolerance)


def test_png_and_raw_folders_give_the_same_pictures(backend: str, open_loader: Open) -> None:
    for raw, png in zip(open_loader(backend), open_loader(backend, encoding="png"), strict=True):
        assert_same(raw, png)


def test_every_sample_once_per_epoch_in_the_order_of_the_plan(backend: str, open_loader: Open) -> None:
    loader = open_loader(backend, augment=None)
    plan = Plan(num_samples=103, batch_size=16, seed=5, drop_last=False)
    orders = []
    for epoch in range(4):
        ids = torch.cat([batch.sample_ids[batch.valid] for batch in loader])
        assert np.array_equal(ids.numpy(), plan.order(epoch))
        orders.append(ids)
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_exactly(world_size: int, backend: str, open_loader: Open) -> None:
    ranks = [open_loader(backend, batch_size=4 * world_size, world_size=world_size, rank=rank, augment=None) for rank in range(world_size)]
    counts = {len(rank) for rank in ranks}
    pictures: dict[int, torch.Tensor] = {}
    for rank in ranks:
        mine = by_id(rank)
        assert not pictures.keys() & mine.keys()
        pictures |= mine
    assert len(counts) == 1
    assert sorted(pictures) == list(range(103))


def test_a_picture_depends_on_seed_epoch_and_id_only(backend: str, open_loader: Open) -> None:
    """Not on batch size, rank, world size or where the epoch was entered."""
    plain = by_id(open_loader(backend))
    small = by_id(open_loader(backend, batch_size=5))
    ranks = [by_id(open_loader(backend, batch_size=8, world_size=2, rank=rank)) for rank in range(2)]
    resumed = open_loader(backend, batch_size=10)
    resumed.load_state_dict({**resumed.state_dict(), "cursor": 37})
    late = by_id(resumed)
    assert len(late) == 103 - 37
    assert plain.keys() == small.keys() == ranks[0].keys() | ranks[1].keys()
    for others in (small, *ranks, late):
        assert all(torch.equal(picture, plain[sample_id]) for sample_id, picture in others.items())
    other_seed, no_shuffle = by_id(open_loader(backend, seed=6)), by_id(open_loader(backend, shuffle=False))
    assert not torch.equal(other_seed[0], plain[0])
    assert all(torch.equal(picture, plain[sample_id]) for sample_id, picture in no_shuffle.items())


def test_epochs_are_augmented_differently_and_can_be_revisited(backend: str, open_loader: Open) -> None:
    loader = open_loader(backend)
    first, second = by_id(loader), by_id(loader)
    assert sum(torch.equal(first[i], second[i]) for i in range(103)) == 0
    loader.set_epoch(0)
    again = by_id(loader)
    assert all(torch.equal(first[i], again[i]) for i in range(103))


def check_sides(loader: Loader) -> None:
    """Nothing blue on the left, nothing red on the right, and something of the right colour in the middle of each."""
    for batch in loader:
        values = batch.images * STD + MEAN
        assert values[:, 1:, :, :32].abs().max() < 0.01, "the right tile is seen on the left"
        assert values[:, :2, :, 32:].abs().max() < 0.01, "the left tile is seen on the right"
        assert values[:, 0, 16, 16].min() > 200.0
        assert values[:, 2, 16, 48].min() > 200.0


SIDES = AugmentConfig(rotate_degrees=45.0, flip_probability=0.5, shift_pixels=4)


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_tiles_keep_their_sides(border: Border, encoding: str, backend: str, make_folder: Callable[..., Path], open_loader: Open) -> None:
    """Red tiles left, blue tiles right: no flip, rotation or shift may mix them."""
    pixels = np.zeros((20, 2, 32, 32, 3), dtype=np.uint8)
    pixels[:, 0, ..., 0], pixels[:, 1, ..., 2] = 255, 255
    check_sides(open_loader(backend, folder=make_folder(pixels, encoding=encoding), augment=dataclasses.replace(SIDES, border=border)))


@pytest.mark.parametrize("change", [{}, {"rotate_degrees": 0.0}, {"rotate_degrees": 0.0, "flip_probability": 0.0}], ids=str)
def test_tiles_that_are_augmented_as_one_picture_would_be_noticed(
    change: dict[str, float], backend: str, make_folder: Callable[..., Path], open_loader: Open
) -> None:
    stacked = np.zeros((20, 1, 32, 64, 3), dtype=np.uint8)
    stacked[..., :32, 0], stacked[..., 32:, 2] = 255, 255
    with pytest.raises(AssertionError, match="is seen"):
        check_sides(open_loader(backend, folder=make_folder(stacked), augment=dataclasses.replace(SIDES, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("border", "wrongs"), [("zero", WRONG), ("reflect", WRONG_BORDERS)], ids=["zero", "reflect"])
def test_a_wrong_operation_would_be_noticed(border: Border, wrongs: list[str], backend: str, pixels: np.ndarray, open_loader: Open) -> None:
    """A batch is the float64 oracle's, and none of those that its wrong versions make."""
    augment, tolerance = dataclasses.replace(STRONG, border=border), 0.05 if backend == "dali" else 0.02
    batch = next(iter(open_loader(backend, augment=augment, batch_size=8)))
    ids = batch.sample_ids.numpy()
    sources = own_tiles(ids, tiles=2)
    table = parameter_table_in_numpy(ids, sources, tile_size=(32, 32), seed=5, epoch=0, augment=augment)
    made = (batch.images * STD + MEAN).permute(0, 2, 3, 1).numpy()
    assert abs(made - oracle(pixels[ids], table, border=border)).max() < tolerance
    for wrong in wrongs:
        assert abs(made - oracle(pixels[ids], table, border=border, wrong=wrong)).max() > 10 * tolerance, wrong


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_the_number_of_threads_changes_nothing(encoding: str, backend: str, open_loader: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    for threads in (1, 3):
        monkeypatch.setattr(loader_module, "usable_threads", lambda threads=threads, **_: threads)
        torch.set_num_threads(threads)
        streams.append(by_id(open_loader(backend, encoding=encoding)))
    assert all(torch.equal(picture, streams[1][sample_id]) for sample_id, picture in streams[0].items())


def test_processes_share_the_cores_of_their_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with eight processes each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_threads(world_size=16, most=32) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert usable_threads(world_size=16, most=32) == 8
    assert usable_threads(world_size=16, most=6) == 6


@pytest.mark.parametrize(("tiles", "height", "width"), [(1, 32, 32), (4, 24, 16)])
def test_any_number_and_size_of_tiles(
    tiles: int, height: int, width: int, make_folder: Callable[..., Path], open_loader: Open, backend: str
) -> None:
    from pairclip_fast.data.augment import augment_tiles

    pixels = np.random.default_rng(0).integers(0, 256, (9, tiles, height, width, 3), dtype=np.uint8)
    loader = open_loader(backend, folder=make_folder(pixels, encoding="png"), batch_size=4)
    for batch in loader:
        ids = batch.sample_ids.numpy()
        sources = own_tiles(ids, tiles=tiles)
        table = torch.from_numpy(parameter_table(ids, sources, tile_size=(height, width), seed=5, epoch=0, augment=FULL))
        expected = augment_tiles(
            torch.from_numpy(pixels[ids]).permute(0, 1, 4, 2, 3), table, mean=(125.0, 120.0, 110.0), std=(60.0, 61.0, 65.0)
        )
        assert ((batch.images - expected).abs() * STD).max() < 0.05


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
@pytest.mark.parametrize("damage", ["zeros", "other size"])
def test_a_bad_picture_is_named(
    encoding: str, damage: str, backend: str, make_folder: Callable[..., Path], pixels: np.ndarray, open_loader: Open
) -> None:
    folder = make_folder(pixels[:30], encoding=encoding, shard_size=12)
    with ShardReader(folder, "train") as reader:
        offset, size = (
            int(column[17]) for column in (reader.spans[reader.manifest.extension].offsets, reader.spans[reader.manifest.extension].sizes)
        )
        good = bytes(reader.payload(17))
    with (folder / "train" / "000001.tar").open("r+b") as shard:
        shard.seek(offset + (0 if damage == "zeros" else _height_offset(good, encoding)))
        shard.write(b"\0" * (size // 2) if damage == "zeros" else b"\0\x21")
    with pytest.raises(DataError) as caught:
        list(open_loader(backend, folder=folder, batch_size=10))
    assert "000001.tar" in str(caught.value.where)
    assert "000000017" in str(caught.value.where)


def _height_offset(picture: bytes, encoding: str) -> int:
    """Where the low 16 bits of the height are: in PNG's IHDR chunk, or in JPEG's SOF0 segment."""
    return 22 if encoding == "png" else picture.index(b"\xff\xc0") + 5


def test_an_error_in_the_thread_reaches_the_consumer(open_loader: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_loader("reference")
    iterator = iter(loader)
    next(iterator)

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("of the thread")

    monkeypatch.setattr("pairclip_fast.data.parameters.parameter_table", fail)
    with pytest.raises(ArithmeticError, match="of the thread"):
        list(iterator)


def test_a_damaged_tar_is_named_by_the_reference_backend(make_folder: Callable[..., Path], pixels: np.ndarray, open_loader: Open) -> None:
    folder = make_folder(pixels[:30], shard_size=12)
    shard = folder / "train" / "000002.tar"
    data = bytearray(shard.read_bytes())
    data[0:4] = b"junk"  # the first name, so its header checksum is wrong too
    shard.write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_loader("reference", folder=folder)
    assert "train" in str(caught.value.where)


def test_choice_of_backend(events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(loader_module, "native", lambda: Native(object(), "there"))
    assert choose_backend("auto", device=CPU, events=events) == choose_backend("native", device=cuda, events=events) == "native"
    assert choose_backend("auto", device=cuda, events=events) == "dali"
    assert events.fallbacks == []
    monkeypatch.setattr(loader_module, "native", lambda: Native(None, "no compiler"))
    assert choose_backend("auto", device=CPU, events=events) == "native"
    (fallback,) = events.fallbacks
    assert (fallback["chosen"], fallback["reason"]) == ("its Python twin", "no compiler")
    with pytest.raises(ConfigError, match="unknown loader"):
        choose_backend("ffcv", device=CPU, events=events)
    monkeypatch.setattr(loader_module, "dali_installed", lambda: False)
    with pytest.raises(EnvironmentLackingError, match="DALI"):
        choose_backend("dali", device=CPU, events=events)
    assert choose_backend("auto", device=cuda, events=events) == "reference"
    assert [event["chosen"] for event in events.fallbacks] == ["its Python twin", "reference"]


def test_refusals(open_loader: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch size"):
        open_loader("reference", batch_size=104, drop_last=True)
    with pytest.raises(ConfigError, match="batch size"):
        open_loader("reference", batch_size=16, world_size=3, rank=0)
    with pytest.raises(DataError, match="split"):
        open_loader("reference", split="test")
    with pytest.raises(DataError):
        open_loader("reference", folder=tmp_path)


def test_small_splits_can_be_evaluated_with_large_batches(backend: str, open_loader: Open) -> None:
    (batch,) = open_loader(backend, batch_size=128)
    assert int(batch.valid.sum()) == 103
    assert len(set(batch.sample_ids[batch.valid].tolist())) == 103


def test_a_reader_holds_one_file_per_shard_and_says_what_a_limit_means(make_folder: Callable[..., Path], pixels: np.ndarray) -> None:
    folder = make_folder(pixels[:24], shard_size=1)
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    with ShardReader(folder, "train") as reader:
        assert RawTiles(reader).gather(np.arange(0, 48, 2)).shape[0] == 24
        assert len(list(files.iterdir())) <= before + 24
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in files.iterdir()}
    tenth_free = [number for number in range(len(taken) + 10) if number not in taken][9]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (tenth_free, hard))
        with pytest.raises(EnvironmentLackingError, match="more shards than the files"):
            ShardReader(folder, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
