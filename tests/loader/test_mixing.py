"""MixUp and CutMix: the distribution of the weights, boxes whose area is the weight, pictures against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.mixing import Mixture, blend, draw_mixture, symmetric_beta

MIXES = ("mixup", "cutmix")
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


def draw(ids: np.ndarray, *, epoch: int = 0, height: int = 24, width: int = 40, **options: object) -> Mixture:
    return draw_mixture(ids, tile_size=(height, width), seed=3, epoch=epoch, augment=AugmentConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])
def test_weights_have_the_beta_distribution(alpha: float) -> None:
    """Against numpy's own generator: every quantile of 20,000 draws."""
    weight = np.sort(draw(np.arange(20_000), mix="mixup", mix_alpha=alpha).weight)
    other = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    gap = abs(np.searchsorted(other, weight) / len(other) - np.arange(len(weight)) / len(weight)).max()
    assert gap < 0.016  # Kolmogorov-Smirnov, p < 1e-4
    assert abs(weight.mean() - 0.5) < 0.02


def test_beta_at_the_ends_of_the_uniforms() -> None:
    grid = np.array([0.0, 0.5, 1.0 - 2.0**-24])
    u, v = np.meshgrid(grid, grid)
    for alpha in (0.05, 1.0, 100.0):
        values = symmetric_beta(u.ravel(), v.ravel(), alpha=alpha)
        assert np.isfinite(values).all()
        assert ((values >= 0.0) & (values <= 1.0)).all()


@pytest.mark.parametrize("mix", MIXES)
@given(ids=IDS, epoch=st.integers(0, 2**20))
def test_a_row_depends_on_its_own_id_only(mix: str, ids: list[int], epoch: int) -> None:
    together = draw(np.array(ids), epoch=epoch, mix=mix, mix_probability=0.7)
    for row, sample_id in enumerate(ids):
        alone = draw(np.array([sample_id]), epoch=epoch, mix=mix, mix_probability=0.7)
        assert together.weight[row] == alone.weight[0]
        assert np.array_equal(together.box[row], alone.box[0])


def test_the_weight_of_cutmix_is_the_share_of_pixels_that_stay() -> None:
    mixture = draw(np.arange(5_000), mix="cutmix")
    x0, x1, y0, y1 = mixture.box.T
    assert ((x0 >= 0) & (x1 <= 40) & (x0 <= x1) & (y0 >= 0) & (y1 <= 24) & (y0 <= y1)).all()
    assert np.array_equal(mixture.weight, (1.0 - (x1 - x0) * (y1 - y0) / 960).astype(np.float32))
    assert np.unique(x0).size > 30
    assert np.unique(y1).size > 20
    # The box has the shape of the tile, where it does not hang over the edge.
    inner = (x0 > 0) & (x1 < 40) & (y0 > 0) & (y1 < 24)
    assert abs((x1 - x0)[inner] / 40 - (y1 - y0)[inner] / 24).max() <= 0.5 / 40 + 0.5 / 24


@pytest.mark.parametrize("mix", MIXES)
def test_the_probability_is_the_share_of_mixed_rows(mix: str) -> None:
    mixture = draw(np.arange(10_000), mix=mix, mix_probability=0.25)
    untouched = mixture.weight == 1.0
    assert abs(untouched.mean() - 0.75) < 0.02
    x0, x1, y0, y1 = mixture.box[untouched].T
    assert not ((x1 - x0) * (y1 - y0)).any()
    assert (draw(np.arange(100), mix=mix, mix_probability=0.0).weight == 1.0).all()


def oracle(own: np.ndarray, other: np.ndarray, mixture: Mixture, *, mix: str, tiles: int, wrong: str = "") -> np.ndarray:
    """Row by row, tile by tile, in float64."""
    out, width = own.astype(np.float64).copy(), own.shape[3] // tiles
    for row, (weight, (x0, x1, y0, y1)) in enumerate(zip(mixture.weight.astype(np.float64), mixture.box, strict=True)):
        if mix == "mixup":
            weight = 1.0 - weight if wrong == "weights exchanged" else weight
            out[row] = weight * own[row] + (1.0 - weight) * other[row]
        for tile in range(1 if wrong == "first tile only" else tiles):
            x = tile * width
            if mix == "cutmix" and wrong == "rows for columns":
                out[row, :, x0:x1, x + y0 : x + y1] = other[row, :, x0:x1, x + y0 : x + y1]
            elif mix == "cutmix":
                out[row, :, y0:y1, x + x0 : x + x1] = other[row, :, y0:y1, x + x0 : x + x1]
    return out


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_blend_equals_the_oracle(mix: str, tiles: int) -> None:
    own, other = np.random.default_rng(0).normal(size=(2, 9, 3, 24, 40 * tiles)).astype(np.float32)
    mixture = draw(np.arange(9), mix=mix)
    images = torch.from_numpy(own.copy())
    weight, box = torch.from_numpy(mixture.weight), torch.from_numpy(mixture.box)
    result = blend(images, torch.from_numpy(other), weight, box, mix=mix, tiles=tiles)
    assert result.data_ptr() == images.data_ptr()
    assert abs(result.numpy() - oracle(own, other, mixture, mix=mix, tiles=tiles)).max() < 1e-6
    errors = ["weights exchanged"] if mix == "mixup" else ["rows for columns"] + ["first tile only"] * (tiles > 1)
    for wrong in errors:
        assert abs(result.numpy() - oracle(own, other, mixture, mix=mix, tiles=tiles, wrong=wrong)).max() > 0.1


def test_it_is_a_fixed_function() -> None:
    """Recorded once: a resumed run of any later version must see the same mixtures."""
    mixture = draw(np.array([5, 12_345]), epoch=2, mix="cutmix")
    assert mixture.box.tolist() == GOLDEN_BOXES
    weight = draw(np.array([5, 12_345]), epoch=2, mix="mixup", mix_alpha=0.4).weight
    assert weight.tolist() == pytest.approx(GOLDEN_WEIGHTS, rel=1e-6)


GOLDEN_BOXES = [[4, 40, 0, 15], [5, 8, 20, 22]]
GOLDEN_WEIGHTS = [0.007675608154386282, 0.999980628490448]
