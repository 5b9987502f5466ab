"""The whitening stem: what it promises about the pictures it was fitted to, and nothing about others."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor

from pairclip_fast.config import TileConvConfig, TileViTConfig
from pairclip_fast.models import whitening
from pairclip_fast.models.build import build_model
from pairclip_fast.models.whitening import AXES, FILTERS, WhitenedStem


@pytest.fixture
def smooth() -> Tensor:
    """Pictures whose neighbouring pixels and colours are alike, as in photos."""
    coarse = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    tiles = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    return tiles + 0.5 * tiles.mean(1, keepdim=True) + 0.1 * torch.randn(tiles.shape, generator=torch.Generator().manual_seed(1))


def second_moments(tiles: Tensor) -> Tensor:
    """Of the first half of the channels, over all positions."""
    stem = WhitenedStem()
    stem.fit(tiles)
    values = rearrange(stem(tiles)[:, :AXES], "n c h w -> (n h w) c").double()
    return values.T @ values / len(values)


def test_channels_are_uncorrelated_and_alike(smooth: Tensor) -> None:
    moments = second_moments(smooth)
    torch.testing.assert_close(moments, torch.diag(moments.diag()), atol=1e-4, rtol=0)
    assert 0.9 < moments.diag().min() <= moments.diag().max() < 1.001, "the floor damps what hardly varies"


def test_a_wrong_scale_would_be_noticed(smooth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "FLOOR", 1.0)
    assert second_moments(smooth).diag().min() < 0.5


def test_every_filter_has_its_opposite(smooth: Tensor) -> None:
    stem = WhitenedStem()
    for _ in range(2):  # before and after the pictures
        seen = stem(smooth)
        assert seen.shape == (64, FILTERS, 15, 15)
        torch.testing.assert_close(seen[:, :AXES], -seen[:, AXES:])
        stem.fit(smooth)


STEMS = {
    "encoder.stem": TileConvConfig(width=4),
    "encoder.stem.whitening": TileViTConfig(width=8, depth=1, heads=2, mlp_width=8, stem_width=4),
}


@pytest.mark.parametrize("stem", STEMS)
def test_filters_are_saved_and_not_trained(smooth: Tensor, stem: str) -> None:
    model = build_model(STEMS[stem], tiles=2, tile_size=(16, 16), dim=8)
    names = {name for name, _ in model.named_parameters()}
    assert f"{stem}.weight" not in names
    assert f"{stem}.bias" in names
    before = model.state_dict()[f"{stem}.weight"].clone()
    model.encoder.prepare(rearrange(smooth, "(b t) c h w -> b c h (t w)", t=2))
    after = model.state_dict()[f"{stem}.weight"]
    assert not torch.equal(before, after)
    alone = WhitenedStem()
    alone.fit(smooth)
    torch.testing.assert_close(after, alone.weight)  # no patch spans two tiles
