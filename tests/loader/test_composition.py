"""Resampled pairs and swapped sides: photos and captions stay together, whatever the batch, the ranks and the resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.composition import Composition
from pairclip_fast.data.parameters import alternating_flips, own_tiles
from pairclip_fast.errors import ConfigError

BOTH = AugmentConfig(pairing="resampled", swap_probability=0.5)
RESAMPLED = AugmentConfig(pairing="resampled")
SWAPPED = AugmentConfig(swap_probability=0.5)


def classes_of(caption_ids: np.ndarray, *, num_classes: int, tiles: int) -> np.ndarray:
    """The class of each tile, one digit after the other from the back."""
    columns = []
    for _ in range(tiles):
        caption_ids, digit = np.divmod(caption_ids, num_classes)
        columns.append(digit)
    return np.stack(columns[::-1], axis=1)


def make(n: int, *, tiles: int, num_classes: int, seed: int, augment: AugmentConfig | None) -> tuple[Composition, np.ndarray]:
    """A composition, and the class of every source [n * tiles]."""
    captions = np.random.default_rng(n).integers(0, num_classes**tiles, n)
    composition = Composition(captions, tiles=tiles, num_classes=num_classes, num_captions=num_classes**tiles, seed=seed, augment=augment)
    return composition, classes_of(captions, num_classes=num_classes, tiles=tiles).ravel()


SIZES = {
    "n": st.integers(1, 200),
    "tiles": st.integers(1, 4),
    "num_classes": st.integers(2, 9),
    "seed": st.integers(0, 2**63 - 1),
    "epoch": st.integers(0, 10**6),
}


@pytest.mark.parametrize("augment", [None, RESAMPLED, SWAPPED, BOTH], ids=["neither", "resampled", "swapped", "both"])
@given(**SIZES)
def test_the_caption_follows_the_photos(n: int, tiles: int, num_classes: int, seed: int, epoch: int, augment: AugmentConfig | None) -> None:
    composition, source_classes = make(n, tiles=tiles, num_classes=num_classes, seed=seed, augment=augment)
    sources, captions = composition.of(np.arange(n), epoch=epoch)
    assert np.array_equal(source_classes[sources], classes_of(captions, num_classes=num_classes, tiles=tiles))


@given(**SIZES)
def test_every_photo_is_shown_once_in_an_epoch(n: int, tiles: int, num_classes: int, seed: int, epoch: int) -> None:
    sources, _ = make(n, tiles=tiles, num_classes=num_classes, seed=seed, augment=BOTH)[0].of(np.arange(n), epoch=epoch)
    assert sorted(sources.ravel().tolist()) == list(range(n * tiles))


@given(**SIZES, cuts=st.lists(st.integers(0, 200), max_size=4))
def test_a_sample_is_the_same_in_every_batch(n: int, tiles: int, num_classes: int, seed: int, epoch: int, cuts: list[int]) -> None:
    """Batch size, rank and resume only decide which ids are asked for together."""
    composition, _ = make(n, tiles=tiles, num_classes=num_classes, seed=seed, augment=BOTH)
    order = np.random.default_rng(seed % 1_000).permutation(n)
    whole = composition.of(order, epoch=epoch)
    parts = [composition.of(part, epoch=epoch) for part in np.split(order, sorted(min(cut, n) for cut in cuts))]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(together, np.concatenate(apart))


def test_left_photos_stay_and_right_ones_change_every_epoch() -> None:
    composition, _ = make(1_000, tiles=2, num_classes=5, seed=3, augment=RESAMPLED)
    ids = np.arange(1_000)
    first, second = (composition.of(ids, epoch=epoch)[0] for epoch in (0, 1))
    for sources in (first, second):
        assert np.array_equal(sources[:, 0], 2 * ids)
        assert (sources[:, 1] % 2 == 1).all()
    assert (first[:, 1] == second[:, 1]).sum() < 8  # expected 1
    assert (first[:, 1] // 2 == ids).sum() < 8


def test_swapping_reverses_half_of_the_samples_anew_each_epoch() -> None:
    composition, _ = make(4_000, tiles=3, num_classes=5, seed=3, augment=SWAPPED)
    ids = np.arange(4_000)
    own = own_tiles(ids, tiles=3)
    swapped = []
    for epoch in (0, 1):
        sources, _ = composition.of(ids, epoch=epoch)
        mirror = (sources == own[:, ::-1]).all(axis=1)
        assert np.array_equal(sources[~mirror], own[~mirror])
        swapped.append(mirror)
        assert abs(mirror.mean() - 0.5) < 0.032  # 4 sigma
    assert abs((swapped[0] == swapped[1]).mean() - 0.5) < 0.032


def test_it_is_a_fixed_function() -> None:
    """Recorded once: a resumed run of any later version must see the same pairs."""
    sources, captions = make(8, tiles=2, num_classes=3, seed=7, augment=BOTH)[0].of(np.arange(8), epoch=2)
    assert sources.tolist() == GOLDEN_SOURCES
    assert captions.tolist() == GOLDEN_CAPTIONS


@pytest.mark.parametrize("augment", [RESAMPLED, SWAPPED])
def test_captions_that_are_not_made_of_classes_are_refused(augment: AugmentConfig) -> None:
    captions = np.zeros(5, dtype=np.int64)
    with pytest.raises(ConfigError, match="augment"):
        Composition(captions, tiles=4, num_classes=3, num_captions=9, seed=0, augment=augment)
    Composition(captions, tiles=4, num_classes=3, num_captions=9, seed=0, augment=AugmentConfig())


def test_alternating_flips_show_every_photo_both_ways_in_two_epochs() -> None:
    sources = own_tiles(np.arange(5_000), tiles=2)
    flips = np.stack([alternating_flips(sources, seed=1, epoch=epoch) for epoch in range(4)])
    assert (flips[0] != flips[1]).all()
    assert np.array_equal(flips[:2], flips[2:])
    assert abs(flips[0].mean() - 0.5) < 0.02  # 4 sigma
    assert abs(np.corrcoef(flips[0].T)[0, 1]) < 0.057
    # A photo that is paired anew keeps its turn.
    moved = np.random.default_rng(0).permutation(sources.ravel()).reshape(sources.shape)
    by_photo = dict(zip(moved.ravel().tolist(), alternating_flips(moved, seed=1, epoch=0).ravel().tolist(), strict=True))
    assert [by_photo[source] for source in sources.ravel().tolist()] == flips[0].ravel().tolist()


GOLDEN_SOURCES = [[0, 7], [2, 5], [4, 15], [6, 3], [11, 8], [10, 9], [12, 1], [14, 13]]
GOLDEN_CAPTIONS = [8, 2, 1, 8, 6, 1, 3, 8]
