"""Pairing, swapping and mixing through whole loaders: what a batch shows is what its captions and weights say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_oracle import MEAN, STD, oracle
from every_backend import Open

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import recipe
from pairclip_fast.data.composition import Composition
from pairclip_fast.data.loader import Batch, Loader
from pairclip_fast.data.parameters import own_tiles, parameter_table
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import DataError

PAIRS = AugmentConfig(pairing="resampled", swap_probability=0.5)
EVERYTHING = AugmentConfig(
    rotate_degrees=10.0,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    flip_probability=0.5,
    alternating_flip=True,
    shift_pixels=3,
    border="reflect",
    cutout_size=9,
    swap_probability=0.5,
    pairing="resampled",
)
MIXED = {mix: dataclasses.replace(EVERYTHING, mix=mix, mix_probability=0.8) for mix in ("mixup", "cutmix")}
TOLERANCE = 0.05
"""In units of the 0..255 scale: DALI's, the reference backend stays below 0.02."""


@pytest.fixture
def open_loader(open_loader: Open) -> Open:
    """As everywhere, but with everything switched on."""

    def make(backend: str, **options: object) -> Loader:
        return open_loader(backend, **{"augment": EVERYTHING, **options})

    return make


@pytest.fixture(scope="module")
def coloured(make_folder: Callable[..., Path]) -> Path:
    """Tiles of one colour that says which they are: red the class, green the sample, blue the side. Captions as in conftest."""
    captions = np.arange(60) * 5 % 9
    pixels = np.zeros((60, 2, 32, 32, 3), dtype=np.uint8)
    for side, classes in enumerate((captions // 3, captions % 3)):
        pixels[:, side, ..., 0] = (40 + 80 * classes)[:, None, None]
        pixels[:, side, ..., 1] = (4 * np.arange(60))[:, None, None]
        pixels[:, side, ..., 2] = 200 * side
    return make_folder(pixels)


def check_labels(batches: list[Batch]) -> None:
    """Read class, sample and side off the colours, and compare with the captions; each photo once; lefts stay with their sample."""
    seen = []
    for batch in batches:
        colours = np.rint(batch.images[:, :, 16, [8, 40]].permute(0, 2, 1).numpy() * np.array(STD) + np.array(MEAN))[batch.valid.numpy()]
        classes, samples, sides = (colours[..., 0] - 40) / 80, colours[..., 1] / 4, colours[..., 2] / 200
        captions, ids = batch.caption_ids[batch.valid].numpy(), batch.sample_ids[batch.valid].numpy()
        assert np.array_equal(classes[:, 0] * 3 + classes[:, 1], captions), "the caption is of other photos"
        assert (sides.sum(axis=1) == 1).all(), "two lefts or two rights"
        assert np.array_equal(np.where(sides[:, 0] == 0, samples[:, 0], samples[:, 1]), ids), "the left photo is another sample's"
        seen += [tuple(pair) for pair in np.stack([samples, sides], axis=2).reshape(-1, 2).tolist()]
    assert len(set(seen)) == len(seen) == 120


def test_photos_and_captions_stay_together(backend: str, coloured: Path, open_loader: Open) -> None:
    augment = dataclasses.replace(PAIRS, flip_probability=0.5, shift_pixels=3, border="reflect")
    loader = open_loader(backend, folder=coloured, augment=augment)
    for _ in range(3):
        check_labels(list(loader))


def test_the_check_notices_what_can_go_wrong(coloured: Path, open_loader: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Composition.of

    def captions_as_sharded(self: Composition, ids: np.ndarray, *, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return right(self, ids, epoch=epoch)[0], np.asarray(ids) * 5 % 9

    def tiles_as_sharded(self: Composition, ids: np.ndarray, *, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return ids[:, None] * 2 + np.arange(2), right(self, ids, epoch=epoch)[1]

    def swapped_again(self: Composition, ids: np.ndarray, *, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        sources, captions = right(self, ids, epoch=epoch)
        return sources[:, ::-1].copy(), captions

    for wrong in (captions_as_sharded, tiles_as_sharded, swapped_again):
        monkeypatch.setattr(Composition, "of", wrong)
        with pytest.raises(AssertionError):
            check_labels(list(open_loader("reference", folder=coloured, augment=PAIRS)))


def own_epoch(folder: Path, *, augment: AugmentConfig, epoch: int) -> recipe.Recipe:
    with ShardReader(folder, "train") as reader:
        plan = Plan(num_samples=103, batch_size=16, seed=5, drop_last=False)
        return recipe.Recipe.of(reader.manifest, reader.caption_ids, plan=plan, augment=augment)


def expected_epoch(folder: Path, pixels: np.ndarray, *, augment: AugmentConfig, epoch: int, wrong: str = "") -> np.ndarray:
    """Every picture of an epoch in the order of the plan, from the float64 oracle, in units of 0..255."""
    plan_of = own_epoch(folder, augment=augment, epoch=epoch)
    order = plan_of.plan.order(epoch)
    tiles = pixels.reshape(-1, *pixels.shape[2:])

    def pictures(ids: np.ndarray, *, partner: bool) -> np.ndarray:
        draw, _ = plan_of.draw(ids, epoch=epoch, partner=partner)
        return oracle(tiles[draw.sources], draw.table(), border=augment.border)

    own = pictures(order, partner=False)
    if augment.mix == "none":
        return own
    half = 51 if wrong != "another partner" else 52
    other = pictures(np.roll(order, -half), partner=wrong != "the partner's own parameters")
    mixture = plan_of.mixture(order if wrong != "the partner's weight" else np.roll(order, -half), epoch=epoch)
    for row, (weight, (x0, x1, y0, y1)) in enumerate(zip(mixture.weight, mixture.box, strict=True)):
        if augment.mix == "mixup":
            own[row] = weight * own[row] + (1.0 - weight) * other[row]
        for x in (0, 32):
            own[row, y0:y1, x + x0 : x + x1] = other[row, y0:y1, x + x0 : x + x1]
    return own


def pixels_of(batches: list[Batch]) -> np.ndarray:
    images = torch.cat([batch.images[batch.valid] for batch in batches])
    return images.permute(0, 2, 3, 1).numpy().astype(np.float64) * np.array(STD) + np.array(MEAN)


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_whole_epochs_equal_the_oracle(mix: str, backend: str, folders: dict[str, Path], pixels: np.ndarray, open_loader: Open) -> None:
    augment = MIXED.get(mix, EVERYTHING)
    loader, epoch = open_loader(backend, augment=augment), 1
    loader.set_epoch(epoch)
    batches = list(loader)
    expected = expected_epoch(folders["raw"], pixels, augment=augment, epoch=epoch)
    assert abs(pixels_of(batches) - expected).max() < TOLERANCE
    assert all((batch.mix_weight is None) == (batch.partner_caption_ids is None) == (mix == "none") for batch in batches)
    if backend == "reference" and mix != "none":
        for wrong in ("another partner", "the partner's own parameters", "the partner's weight"):
            expected = expected_epoch(folders["raw"], pixels, augment=augment, epoch=epoch, wrong=wrong)
            assert abs(pixels_of(batches) - expected).max() > 10.0, wrong


def test_targets_of_a_mixture_are_those_of_its_pictures(coloured: Path, open_loader: Open) -> None:
    """MixUp of plain colours: the red value is the weighted mean of the two classes that the captions name."""
    augment = dataclasses.replace(PAIRS, mix="mixup", mix_probability=0.7)
    weights = []
    for batch in open_loader("reference", folder=coloured, augment=augment):
        assert batch.partner_caption_ids is not None
        assert batch.mix_weight is not None
        own, other = (np.stack(np.divmod(ids.numpy(), 3), axis=1) for ids in (batch.caption_ids, batch.partner_caption_ids))
        weight = batch.mix_weight.numpy()[:, None]
        red = batch.images[:, 0, 16, [8, 40]].numpy() * STD[0] + MEAN[0]
        assert abs(red - 40 - 80 * (weight * own + (1 - weight) * other)).max() < 0.01
        weights += weight.ravel().tolist()
    assert 0.1 < np.mean(np.array(weights) == 1.0) < 0.5


def by_id(loader: Loader) -> dict[int, tuple[torch.Tensor, ...]]:
    """One epoch: sample id -> picture, captions, weight."""
    found = {}
    for batch in loader:
        assert batch.partner_caption_ids is not None
        assert batch.mix_weight is not None
        columns = (batch.images, batch.caption_ids, batch.partner_caption_ids, batch.mix_weight)
        for sample_id, valid, *values in zip(batch.sample_ids.tolist(), batch.valid.tolist(), *columns, strict=True):
            if valid:
                assert sample_id not in found
                found[sample_id] = tuple(values)
    return found


def test_a_mixture_depends_on_seed_epoch_and_position_only(backend: str, open_loader: Open) -> None:
    """Not on batch size, rank, world size or where the epoch was entered."""
    augment = MIXED["cutmix" if backend == "dali" else "mixup"]
    plain = by_id(open_loader(backend, augment=augment))
    small = by_id(open_loader(backend, augment=augment, batch_size=5))
    ranks = [by_id(open_loader(backend, augment=augment, batch_size=8, world_size=2, rank=rank)) for rank in range(2)]
    resumed = open_loader(backend, augment=augment, batch_size=10)
    resumed.load_state_dict(json.loads(json.dumps({**resumed.state_dict(), "cursor": 37})))
    late = by_id(resumed)
    assert len(late) == 103 - 37
    assert plain.keys() == small.keys() == ranks[0].keys() | ranks[1].keys()
    for others in (small, *ranks, late):
        for sample_id, values in others.items():
            assert all(torch.equal(value, same) for value, same in zip(values, plain[sample_id], strict=True))
    other_seed = by_id(open_loader(backend, augment=augment, seed=6))
    assert not torch.equal(other_seed[0][0], plain[0][0])


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_backends_agree_on_encoded_pictures(encoding: str, open_loader: Open) -> None:
    pytest.importorskip("nvidia.dali")
    loaders = [open_loader(backend, encoding=encoding, augment=MIXED["cutmix"]) for backend in ("reference", "dali")]
    tolerance = 2.0 if encoding == "jpeg" else TOLERANCE  # JPEG decoders may differ by a rounding
    for first, second in zip(*loaders, strict=True):
        assert torch.equal(first.caption_ids, second.caption_ids)
        scale = torch.tensor(STD).view(3, 1, 1)
        assert ((first.images - second.images).abs() * scale).max() < tolerance


@pytest.mark.parametrize(
    "change",
    [
        {"border": "zero"},
        {"cutout_size": 8},
        {"swap_probability": 0.25},
        {"pairing": "fixed"},
        {"alternating_flip": False},
        {"mix": "mixup"},
        {"mix_alpha": 0.5},
        {"mix_probability": 0.5},
    ],
    ids=str,
)
def test_a_state_of_another_augmentation_is_refused(change: dict[str, object], open_loader: Open) -> None:
    state = open_loader("reference", augment=MIXED["cutmix"]).state_dict()
    other = open_loader("reference", augment=dataclasses.replace(MIXED["cutmix"], **change))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="augment"):
        other.load_state_dict(state)


@pytest.mark.parametrize("rotate_degrees", [0.0, 30.0])
@pytest.mark.parametrize(("tiles", "height", "width"), [(1, 6, 9), (4, 24, 16), (2, 1, 5)])
def test_mirrored_borders_of_any_tile(
    tiles: int, height: int, width: int, rotate_degrees: float, backend: str, make_folder: Callable[..., Path], open_loader: Open
) -> None:
    """Also where the shift is larger than the tile."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, tiles, height, width, 3), dtype=np.uint8)
    augment = AugmentConfig(shift_pixels=16, rotate_degrees=rotate_degrees, border="reflect", cutout_size=4, flip_probability=0.5)
    loader = open_loader(backend, folder=make_folder(pixels, encoding="png"), batch_size=4, augment=augment)
    for batch in loader:
        ids = batch.sample_ids.numpy()
        sources = own_tiles(ids, tiles=tiles)
        table = parameter_table(ids, sources, tile_size=(height, width), seed=5, epoch=0, augment=augment)
        expected = oracle(pixels[ids], table, border="reflect")[batch.valid.numpy()]
        assert abs(pixels_of([batch]) - expected).max() < TOLERANCE


def test_dali_goes_on_after_a_bad_picture(make_folder: Callable[..., Path], pixels: np.ndarray, open_loader: Open) -> None:
    pytest.importorskip("nvidia.dali")
    folder = make_folder(pixels[:30], encoding="png")
    with ShardReader(folder, "train") as reader:
        offset = int(reader.spans["png"].offsets[17])
    with (folder / "train" / "000000.tar").open("r+b") as shard:
        shard.seek(offset)
        shard.write(b"\0" * 60)
    loader = open_loader("dali", folder=folder, batch_size=1, augment=None, shuffle=False)
    reference = make_folder(pixels[:30], encoding="png")
    expected = pixels_of(list(open_loader("reference", folder=reference, batch_size=1, augment=None, shuffle=False)))
    with pytest.raises(DataError) as caught:
        list(loader)
    assert "000000017" in str(caught.value.where)
    assert loader.state_dict()["cursor"] == 17
    loader.load_state_dict({**loader.state_dict(), "cursor": 18})
    assert abs(pixels_of(list(loader)) - expected[18:]).max() < 1e-3
