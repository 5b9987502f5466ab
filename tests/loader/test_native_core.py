"""The C++ core against its definitions: every instruction set against the oracle, plan and checksums bit by bit."""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from augment_oracle import MEAN, STD, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_augment import BORDERS, CONFIGS, FULL, WRONG, WRONG_BORDERS, random_case

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import augment_tiles
from pairclip_fast.data.parameters import Column, identity_table, own_tiles, parameter_table, parameter_table_in_numpy
from pairclip_fast.data.plan import Stream, keyed_permutation, keyed_permutation_in_numpy
from pairclip_fast.native import native

pytestmark = pytest.mark.skipif(native().module is None, reason=native().reason)
CORE: Any = native().module
TOLERANCE = 0.02
"""In units of the 0..255 scale."""
ISAS = tuple(CORE.loader_isas()) if CORE else ()


def make_filler(shape: tuple[int, ...], *, border: str = "zero", isa: str = "", threads: int = 1, bf16: bool = False) -> Any:
    tiles, height, width, _ = shape
    settings = {"mean": MEAN, "std": STD, "border": border, "bf16": bf16, "threads": threads, "isa": isa}
    return CORE.Filler(tiles=tiles, height=height, width=width, **settings)


def make_records(payloads: list[bytes], *, checksums: list[int] | None = None) -> Any:
    """Records in two shards, back to back."""
    half = len(payloads) // 2
    shards = [np.frombuffer(b"".join(part) + b"end", dtype=np.uint8) for part in (payloads[:half], payloads[half:])]
    sizes = np.array([len(payload) for payload in payloads], dtype=np.int64)
    offsets = np.concatenate([np.cumsum(part) - part for part in (sizes[:half], sizes[half:])])
    sums = np.array([zlib.crc32(payload) for payload in payloads] if checksums is None else checksums, dtype=np.uint32)
    return CORE.Records(shards, np.array([0, half, len(payloads)]), offsets, sizes, sums)


def fill(tiles: np.ndarray, table: np.ndarray, *, sources: np.ndarray | None = None, **options: Any) -> torch.Tensor:
    """Normalised pictures of tiles [b, t, h, w, 3], through raw records."""
    count, _, height, width, _ = tiles.shape
    sources = own_tiles(np.arange(count), tiles=tiles.shape[1]) if sources is None else sources
    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    images = torch.full((len(sources), 3, height, sources.shape[1] * width), float("nan"), dtype=dtype)
    records = make_records([sample.tobytes() for sample in tiles])
    _, damaged = make_filler(tiles.shape[1:], **options).fill_records(records, sources, table, images)
    assert damaged == []
    return images


def run(tiles: np.ndarray, table: np.ndarray, **options: Any) -> np.ndarray:
    """The same in units of 0..255, float64 [b, h, w, 3]."""
    return fill(tiles, table, **options).permute(0, 2, 3, 1).float().numpy().astype(np.float64) * np.array(STD) + np.array(MEAN)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_oracle(name: str, border: str, isa: str) -> None:
    tiles, table = random_case(CONFIGS[name])
    assert abs(run(tiles, table, border=border, isa=isa) - oracle(tiles, table, border=border)).max() < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("config", [FULL, CONFIGS["colour, flip and shift"]], ids=["rotated", "not rotated"])
@pytest.mark.parametrize(
    ("tiles", "height", "width"), [(1, 32, 32), (4, 16, 16), (3, 24, 40), (2, 31, 17), (2, 5, 7), (2, 1, 3), (1, 1, 1)]
)
def test_other_tile_counts_and_sizes(config: AugmentConfig, tiles: int, height: int, width: int, border: str, isa: str) -> None:
    pixels, table = random_case(config, batch=4, tiles=tiles, height=height, width=width)
    result = run(pixels, table, border=border, isa=isa)
    assert result.shape == (4, height, tiles * width, 3)
    assert abs(result - oracle(pixels, table, border=border)).max() < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [32, 31, 16])
@pytest.mark.parametrize("stretch", [1.0, 1.9])
def test_equals_the_oracle_at_every_angle(stretch: float, width: int, isa: str) -> None:
    """How many rows a vector meets decides how it is made, and so do strong colours."""
    rng = np.random.default_rng(0)
    angles = np.concatenate([np.arange(-30.0, 31.0), [1e-3, -1e-3, 7.6, 7.7, 15.4, 15.5, 23.5, 23.6, 45.0, 90.0, 180.0]])
    tiles = rng.integers(0, 256, (len(angles), 1, 32, width, 3), dtype=np.uint8)
    table = identity_table(len(angles), tiles=1)
    table[:, 0, Column.ANGLE] = angles
    for column in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION):
        table[:, 0, column] = stretch
    table[:, 0, Column.FLIP] = rng.integers(0, 2, len(angles))
    table[::3, 0, Column.SHIFT_X], table[::4, 0, Column.SHIFT_Y] = 9, -16
    assert abs(run(tiles, table, isa=isa) - oracle(tiles, table)).max() < TOLERANCE


@pytest.mark.parametrize(("border", "wrong"), [("zero", wrong) for wrong in WRONG] + [("reflect", wrong) for wrong in WRONG_BORDERS])
def test_a_wrong_operation_would_be_noticed(wrong: str, border: str) -> None:
    tiles, table = random_case(FULL)
    assert abs(run(tiles, table, border=border) - oracle(tiles, table, border=border, wrong=wrong)).max() > 10 * TOLERANCE


@settings(max_examples=100)
@given(
    isa=st.sampled_from(ISAS or ("",)),
    border=st.sampled_from(BORDERS),
    seed=st.integers(0, 2**32),
    angle=st.floats(-180.0, 180.0),
    factors=st.tuples(*3 * (st.floats(0.0, 2.0),)),
    flip=st.booleans(),
    shift=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
    cut=st.tuples(st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 30)),
)
def test_equals_the_oracle_for_any_parameters(
    isa: str, border: str, seed: int, angle: float, factors: tuple[float, ...], flip: bool, shift: tuple[int, int], cut: tuple[int, ...]
) -> None:
    tiles = np.random.default_rng(seed).integers(0, 256, (1, 1, 16, 19, 3), dtype=np.uint8)
    table = np.array([[[angle, *factors, flip, *shift, *cut]]], dtype=np.float32)
    assert abs(run(tiles, table, border=border, isa=isa) - oracle(tiles, table, border=border)).max() < TOLERANCE


@pytest.mark.parametrize("border", BORDERS)
def test_nonsense_in_the_table_stays_in_its_tile(border: str) -> None:
    """NaN, infinities and huge numbers: no crash, and no other tile changes."""
    tiles, table = random_case(FULL, batch=60)
    expected = fill(tiles, table, border=border)
    rng = np.random.default_rng(0)
    for row in range(0, 60, 2):
        columns = rng.choice(len(Column), 3, replace=False)
        table[row, 0, columns] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 1e9], 3)
    for isa in ISAS:
        got = fill(tiles, table, border=border, isa=isa)
        assert ((got[1::2] - expected[1::2]).abs() < 1e-3).all()
        assert ((got[..., 32:] - expected[..., 32:]).abs() < 1e-3).all()


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_float32_rounded(isa: str) -> None:
    for name in CONFIGS:
        tiles, table = random_case(CONFIGS[name])
        assert torch.equal(fill(tiles, table, isa=isa, bf16=True), fill(tiles, table, isa=isa).bfloat16())


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    tiles, table = random_case(FULL, batch=101)
    alone = fill(tiles, table)
    for threads in (2, 3, 7):
        assert torch.equal(fill(tiles, table, threads=threads), alone)
    assert torch.equal(fill(tiles[40:50], table[40:50]), alone[40:50])


def test_sources_may_come_from_anywhere() -> None:
    """Tiles of other samples, out of order and more than once, from records as from pictures."""
    tiles, _ = random_case(None, batch=20)
    sources = np.random.default_rng(0).integers(0, 40, (33, 2))
    table = parameter_table(np.arange(33), sources, tile_size=(32, 32), seed=0, epoch=0, augment=FULL)
    wanted = augment_tiles(
        torch.from_numpy(tiles.reshape(40, 32, 32, 3)[sources]).permute(0, 1, 4, 2, 3), torch.from_numpy(table), mean=MEAN, std=STD
    )
    got = fill(tiles, table, sources=sources)
    assert ((got - wanted).abs() < TOLERANCE / 60).all()
    from_pictures = torch.empty_like(got)
    pictures = np.concatenate([tiles[:, 0], tiles[:, 1]], axis=2)
    make_filler((2, 32, 32, 3)).fill_pictures(pictures, sources, table, from_pictures)
    assert torch.equal(from_pictures, got)


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    tiles=st.integers(1, 3),
    epoch=st.integers(0, 2**20),
    seed=st.integers(0, 2**63 - 1),
    partner=st.booleans(),
    ranges=st.tuples(*4 * (st.floats(0.0, 1.0),)),
    geometry=st.tuples(st.integers(0, 16), st.integers(0, 9), st.booleans()),
)
def test_tables_are_numpys_bit_by_bit(
    ids: list[int], tiles: int, epoch: int, seed: int, partner: bool, ranges: tuple[float, ...], geometry: tuple[int, int, bool]
) -> None:
    shift, cutout, alternating = geometry
    rotate, brightness, contrast, saturation = ranges
    augment = AugmentConfig(
        rotate_degrees=180.0 * rotate,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        flip_probability=0.5,
        alternating_flip=alternating,
        shift_pixels=shift,
        cutout_size=cutout,
    )
    sources = own_tiles(np.array(ids), tiles=tiles)[:, ::-1].copy()
    options: dict[str, Any] = {"tile_size": (24, 40), "seed": seed, "epoch": epoch, "augment": augment, "partner": partner}
    assert np.array_equal(parameter_table(np.array(ids), sources, **options), parameter_table_in_numpy(np.array(ids), sources, **options))


@given(count=st.integers(0, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32 - 1), tile=st.integers(0, 3))
def test_orders_are_numpys_number_by_number(count: int, seed: int, epoch: int, tile: int) -> None:
    options: dict[str, Any] = {"seed": seed, "epoch": epoch, "tile": tile, "stream": Stream.PAIRING}
    assert np.array_equal(keyed_permutation(count, **options), keyed_permutation_in_numpy(count, **options))


@pytest.mark.parametrize("size", [1023, 1024, 1279, 1280, 1300, 2048, 6144, 6145, 6200, 6399, 10_000])
def test_checksums_of_whole_records_are_zlibs(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert CORE.crc32(data) == CORE.crc32_portable(data) == zlib.crc32(data.tobytes())


@given(st.binary(max_size=700), st.integers(0, 63))
def test_checksums_are_zlibs(data: bytes, offset: int) -> None:
    view = np.frombuffer(bytes(offset) + data, dtype=np.uint8)[offset:]
    assert CORE.crc32(view) == CORE.crc32_portable(view) == zlib.crc32(data)


def test_records_outside_their_shard_are_refused() -> None:
    shard = np.zeros(100, dtype=np.uint8)

    def make(starts: list[int], offsets: list[int], sizes: list[int]) -> Any:
        return CORE.Records([shard], np.array(starts), np.array(offsets), np.array(sizes), np.zeros(len(sizes), dtype=np.uint32))

    make([0, 2], [0, 90], [10, 10])
    for starts, offsets, sizes in (
        ([0, 1], [91], [10]),
        ([0, 1], [-1], [10]),
        ([0, 1], [0], [-1]),
        ([0, 1], [2**62], [2**62]),
        ([0, 2], [0], [1]),
        ([1, 1], [0], [1]),
        ([0, 1], [0, 0], [1]),
    ):
        with pytest.raises(ValueError, match=r"record|shards|tables"):
            make(starts, offsets, sizes)


def test_what_does_not_fit_together_is_refused() -> None:
    filler, images = make_filler((2, 32, 32, 3)), torch.empty(1, 3, 32, 64)
    records, table = make_records([bytes(6144)] * 2), identity_table(1, tiles=2)
    for sources in ([[0, 4]], [[-1, 0]], [[0, 2**40]]):
        with pytest.raises(ValueError, match="source"):
            filler.fill_records(records, np.array(sources), table, images)
    good = np.array([[0, 1]])
    for wrong in (torch.empty(2, 3, 32, 64), torch.empty(1, 3, 32, 32), images.double(), images[..., :32], images.bfloat16()):
        with pytest.raises((ValueError, TypeError)):
            filler.fill_records(records, good, table, wrong)
    for bad_table in (identity_table(2, tiles=2), identity_table(1, tiles=1), table[..., :7].copy()):
        with pytest.raises((ValueError, TypeError)):
            filler.fill_records(records, good, bad_table, images)
    for name in ("border", "isa"):
        with pytest.raises((ValueError, TypeError)):
            CORE.Filler(tiles=2, height=32, width=32, mean=MEAN, std=STD, bf16=False, threads=0, **{"border": "zero", name: "wrap"})


def test_a_changed_or_cut_record_is_reported_and_its_row_left_alone() -> None:
    payloads = [bytes([value]) * 6144 for value in range(10)]
    sums = [zlib.crc32(payload) for payload in payloads]
    payloads[3] = payloads[3][:-1] + b"x"
    payloads[7] = payloads[7][:-1]
    sums[7] = zlib.crc32(payloads[7])
    images = torch.full((10, 3, 32, 64), -9.0)
    sources, table = own_tiles(np.arange(10), tiles=2), identity_table(10, tiles=2)
    records = make_records(payloads, checksums=sums)
    _, damaged = make_filler((2, 32, 32, 3), threads=2).fill_records(records, sources, table, images)
    assert damaged == [3, 7]
    assert [bool((image == -9.0).all()) for image in images] == [row in damaged for row in range(10)]


def test_a_forked_process_has_threads_of_its_own() -> None:
    tiles, table = random_case(FULL, batch=64)
    filler, images = make_filler((2, 32, 32, 3), threads=2), torch.empty(64, 3, 32, 64)
    records, sources = make_records([sample.tobytes() for sample in tiles]), own_tiles(np.arange(64), tiles=2)
    filler.fill_records(records, sources, table, images)
    child = os.fork()
    if child == 0:
        again = torch.empty_like(images)
        filler.fill_records(records, sources, table, again)
        os._exit(0 if torch.equal(again, images) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_of_a_batch_is_taken_again_only_when_nothing_refers_to_it(*, bf16: bool) -> None:
    filler = make_filler((2, 32, 32, 3), bf16=bf16)
    batch = filler.batch(300)
    assert batch.shape == (300, 3, 32, 64)
    assert batch.dtype == (torch.bfloat16 if bf16 else torch.float32)
    place, part = batch.data_ptr(), batch[2:4].fill_(7.0)
    del batch
    other = filler.batch(300).fill_(0.0)
    assert other.data_ptr() != place
    assert bool((part == 7.0).all())
    del part
    smaller = filler.batch(20)
    assert smaller.data_ptr() == place
    larger = filler.batch(600).fill_(1.0)
    del filler
    assert bool((larger == 1.0).all())  # a batch outlives the filler
    assert bool((smaller.fill_(2.0) == 2.0).all())
    assert bool((other == 0.0).all())
