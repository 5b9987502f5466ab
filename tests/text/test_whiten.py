"""Whitening: a linear map, unit rows, decorrelated directions, independent of LAPACK's signs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog
from pairclip_fast.text.bank import CaptionBank, embed_bank
from pairclip_fast.text.hashed import HashedEncoder
from pairclip_fast.text.inspect import swap_cosine
from pairclip_fast.text.whiten import apply_map, name_means, principal_axes, whitening_map

from .conftest import TEMPLATE


def cone(n: int, dim: int, *, seed: int, rank: int | None = None) -> torch.Tensor:
    """Unit rows in a narrow cone, as text encoders give them."""
    generator = torch.Generator().manual_seed(seed)
    inner = min(rank or dim, dim)
    rows = torch.randn(n, inner, generator=generator) @ torch.randn(inner, dim, generator=generator) / inner**0.5
    return torch.nn.functional.normalize(rows * 0.1 + torch.ones(dim), dim=-1)


def bank_of(features: torch.Tensor) -> CaptionBank:
    free = tuple(f"caption {i}" for i in range(len(features)))
    return CaptionBank(text_features=features, encoder="test", model="test", digest="0", free_captions=free)


@given(st.integers(2, 40), st.integers(2, 12), st.integers(1, 15), st.integers(0, 99))
def test_rows_are_unit_and_the_map_is_the_stored_one(n: int, dim: int, rank: int, seed: int) -> None:
    raw = bank_of(cone(n, dim, seed=seed))
    white = raw.whiten(rank)
    assert white.kind == "whiten"
    assert white.dim <= min(rank, dim, n - 1)
    assert torch.allclose(white.text_features.norm(dim=1), torch.ones(n), atol=1e-6)
    assert white.mean is not None
    assert white.projection is not None
    by_hand = (raw.text_features.double() - white.mean) @ white.projection
    by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
    assert torch.allclose(white.text_features.double(), by_hand, atol=1e-6)
    assert torch.equal(white.map_features(raw.text_features[:1]), white.text_features[:1]), "unseen captions take the same map"


@given(st.integers(0, 99))
def test_before_normalisation_the_directions_are_white(seed: int) -> None:
    features = cone(200, 8, seed=seed)
    mean, projection = whitening_map(features, rank=8)
    mapped = (features.double() - mean) @ projection
    covariance = mapped.T @ mapped / 200
    assert torch.allclose(covariance, torch.eye(projection.shape[1], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.0])
def test_it_agrees_with_the_singular_value_decomposition(strength: float) -> None:
    """Oracle: numpy's SVD of the centred float64 matrix; rows of U S^(1 - strength), normalised, up to the sign of a column."""
    features = cone(300, 20, seed=3)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    u, s, axes = np.linalg.svd(centred, full_matrices=False)
    u = u[:, :7] * s[:7] ** (1 - strength)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    white = bank_of(features).whiten(7, strength=strength).text_features.double().numpy()
    signs = np.sign((u * white).sum(0))
    assert np.allclose(u * signs, white, atol=1e-6)
    wrong = centred @ axes[:7].T * (s[:7] if strength == 0 else 1)  # whitened too little: not at all, or the wrong way
    wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
    assert not np.allclose(np.abs(wrong), np.abs(white), atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_rank_is_that_of_the_features(rank: int) -> None:
    """Rounding to float32 must not count as directions."""
    features = cone(500, 30, seed=5, rank=rank)
    unnormalised = features / features[:, :1]  # normalising bends the flat; undo it up to a common factor
    assert len(principal_axes(unnormalised)[1]) == rank


def test_signs_are_fixed() -> None:
    axes = principal_axes(cone(100, 6, seed=1))[2]
    strongest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    assert bool((strongest > 0).all())


def test_swaps_come_apart() -> None:
    bank = embed_bank(HashedEncoder(), class_names=tuple("abcdefgh"), template=TEMPLATE, events=EventLog(console=False))
    raw, white = swap_cosine(bank), swap_cosine(bank.whiten(200))
    assert raw is not None
    assert white is not None
    assert raw > 0.7
    assert white < 0.1


def test_captions_that_are_all_alike_cannot_be_whitened() -> None:
    with pytest.raises(DataError, match="cannot be told apart"):
        bank_of(torch.nn.functional.normalize(torch.ones(4, 3), dim=1)).whiten(2)


def test_a_feature_on_the_mean_has_no_direction() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mean, projection = whitening_map(features, rank=1)
    with pytest.raises(DataError, match="no direction"):
        apply_map(mean.float().unsqueeze(0), mean=mean, projection=projection)


def test_whitening_twice_is_our_bug() -> None:
    with pytest.raises(ValueError, match="whiten"):
        bank_of(cone(9, 4, seed=0)).whiten(2).whiten(2)


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 99))
def test_the_ensemble_keeps_what_the_names_say_and_drops_what_their_combination_says(classes: int, dim: int, seed: int) -> None:
    """Oracle: features built as left + right + combination, where a combination has mean zero over either name."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(classes, 1, dim, generator=generator, dtype=torch.float64)
    right = torch.randn(1, classes, dim, generator=generator, dtype=torch.float64)
    combination = torch.randn(classes, classes, dim, generator=generator, dtype=torch.float64)
    combination = combination - combination.mean(0) - combination.mean(1, keepdim=True) + combination.mean((0, 1))
    parts = (left + right).flatten(0, 1)
    features = parts + combination.flatten(0, 1)
    assert torch.allclose(name_means(features, classes=classes), parts, atol=1e-12)
    one_sided = features.unflatten(0, (classes, classes)).mean(1, keepdim=True).expand(-1, classes, -1).flatten(0, 1)
    assert not torch.allclose(one_sided, parts, atol=1e-3), "averaging one side only loses the other"


def test_an_ensembled_bank_still_tells_all_captions_apart() -> None:
    names = ("cat", "dog", "red fox", "oak")
    raw = embed_bank(HashedEncoder(), class_names=names, template=TEMPLATE, events=EventLog(None))
    plain, ensembled = raw.whiten(64), raw.whiten(64, prompt_ensemble=True)
    assert ensembled.dim == 2 * (len(names) - 1), "one direction per name and side, but for the means"
    assert ensembled.groups.tolist() == plain.groups.tolist() == list(range(16))
    top = ensembled.text_features @ ensembled.text_features.T
    assert torch.equal(top.argmax(1), torch.arange(16))
    with pytest.raises(ValueError, match="ensemble"):
        bank_of(cone(4, 3, seed=0)).whiten(2, prompt_ensemble=True)
