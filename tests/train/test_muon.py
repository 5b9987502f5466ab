"""Muon: orthogonal updates where they belong, against an SVD oracle; AdamW elsewhere; nothing moves on a bad step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pairclip_fast.config import LossConfig, ModelConfig, OptimizerConfig, TileConvConfig, TileViTConfig, ViTConfig
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import build_model
from pairclip_fast.train import muon
from pairclip_fast.train.loop import LossModule
from pairclip_fast.train.muon import NEWTON_SCHULZ, MuonAdamW, orthogonalize
from pairclip_fast.train.optimizer import build_optimizer, parameter_groups
from pairclip_fast.train.precision import Precision

MUON = OptimizerConfig(kind="muon", lr=1e-2, muon_lr=0.1, muon_momentum=0.5, weight_decay=0.1)
SMALL: list[ModelConfig] = [
    ViTConfig(width=16, depth=1, heads=2, mlp_width=16, patch_size=16),
    TileViTConfig(width=16, depth=2, heads=2, mlp_width=16, patch_size=8, stem_width=4),
    TileConvConfig(width=4, residuals=1),
]


def module_of(config: ModelConfig) -> LossModule:
    encoder = build_model(config, tiles=2, tile_size=(32, 32), dim=6)
    bank = nn.functional.normalize(torch.randn(12, 6), dim=-1)
    return LossModule(encoder, ContrastiveLoss(LossConfig(), bank=bank), precision=Precision("fp32", "cpu", "test"))


def one_matrix(value: torch.Tensor, **keywords: Any) -> tuple[nn.Parameter, MuonAdamW]:
    parameter = nn.Parameter(value.clone())
    group = {"params": [parameter], "weight_decay": 0.0, "orthogonal": True} | keywords
    return parameter, MuonAdamW([group], lr=0.1, momentum=0.5)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.floats(1e-4, 1e4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_singular_values_become_about_one(rows: int, columns: int, scale: float, seed: int) -> None:
    """Directions stay, lengths go: U^T result V is near the identity for every direction that is not negligible."""
    matrix = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalize(matrix, iterations=10) @ vh.T
    strong = values > 0.05 * values[0]
    assert torch.all((core.diagonal()[strong] - 1).abs() < 0.4)
    assert (core - core.diagonal().diag()).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(32, 288), (64, 27), (40, 40)])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_equals_the_iterations_as_they_are_defined(shape: tuple[int, int], iterations: int) -> None:
    """X -> a X + (b G + c G^2) X with G = X X', in float64; singular values over four decades, in float32."""
    rows, columns = shape
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, columns)
    a, b, c = NEWTON_SCHULZ
    wide = matrix.double().T if rows > columns else matrix.double()
    x = wide / wide.norm()
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x.T if rows > columns else x
    found = orthogonalize(matrix, iterations=iterations)
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if iterations <= 3 else 1e-3)


def test_three_iterations_already_level_the_spectrum() -> None:
    matrix = torch.randn(32, 288, generator=torch.Generator().manual_seed(0))
    before, after = torch.linalg.svdvals(matrix / matrix.norm()), torch.linalg.svdvals(orthogonalize(matrix, iterations=3))
    assert before.max() / before.min() > 1.5
    assert after.max() / after.min() < 1.5
    assert 0.6 < after.min() < after.max() < 1.3


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.architecture)
def test_every_parameter_is_in_one_group_and_only_the_trunk_is_orthogonalised(config: ModelConfig) -> None:
    module = module_of(config)
    groups = parameter_groups(module, config=MUON)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(module.parameters()))
    orthogonal = {id(p) for group in groups if group.get("orthogonal") for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in orthogonal}
    assert names
    outside = ("head", "stem.bias", "whitening", "project", "position", "cls", "norm", "scale")
    assert not any(word in name for name in names for word in outside)
    plain = parameter_groups(module, config=OptimizerConfig(kind="adamw"))
    assert not any(group.get("orthogonal") for group in plain)


def test_the_matrix_update_is_what_the_paper_says() -> None:
    """Nesterov momentum, orthogonalised, stretched for tall matrices; written out here with an explicit history."""
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 5), [torch.randn(12, 5) for _ in range(3)]
    parameter, optimizer = one_matrix(start, weight_decay=0.2)
    expected, momentum = start.clone(), torch.zeros(12, 5)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.5 * momentum + gradient
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * (12 / 5) ** 0.5 * orthogonalize(gradient + 0.5 * momentum, iterations=3)
        assert parameter.grad is not None, "the gradient is still there for whoever looks at it"
    assert torch.allclose(parameter, expected, atol=1e-6)


def test_parameters_of_one_shape_are_updated_together_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Three filters, two of one shape, and two matrices; each has its own norm, gradient and momentum."""
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (6, 5), (8, 4, 3, 3), (4, 4, 3, 3), (6, 5)]
    starts = [(1 + number) * torch.randn(shape) for number, shape in enumerate(shapes)]
    together = [nn.Parameter(start.clone(memory_format=torch.preserve_format)) for start in starts]
    together[0].data = together[0].data.contiguous(memory_format=torch.channels_last)
    settings = {"weight_decay": 0.2, "lr": 0.1, "orthogonal": True}
    joint = MuonAdamW([{"params": together, **settings}], momentum=0.5)
    alone = [nn.Parameter(start.clone()) for start in starts]
    apart = [MuonAdamW([{"params": [parameter], **settings}], momentum=0.5) for parameter in alone]
    for _ in range(3):
        for mine, theirs in zip(together, alone, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        monkeypatch.setattr(muon, "BATCHED", ("cpu",))
        assert sorted(map(len, muon._together(together))) == [1, 2, 2]
        joint.step()
        monkeypatch.undo()
        assert len(muon._together(together)) == 5
        for optimizer in apart:
            optimizer.step()
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert together[0].is_contiguous(memory_format=torch.channels_last), "the layout stays"


def test_filters_keep_their_norm_and_ignore_the_gradients_scale() -> None:
    torch.manual_seed(0)
    start, gradient = 7 * torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    results = []
    for scale in (1.0, 1e3):
        parameter, optimizer = one_matrix(start)
        parameter.grad = scale * gradient
        optimizer.step()
        results.append(parameter.detach().clone())
    update = start * (8**0.5 / start.norm()) - results[0]
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.linalg.svdvals(update.reshape(8, -1) / 0.1).sub(1).abs().max() < 0.4


def test_nothing_moves_where_the_gradient_is_not_finite() -> None:
    """Neither weights nor momentum, with the flag the guard sets; and without it the same gradient does harm."""
    start = torch.randn(6, 6)
    for flag in (1.0, 0.0):
        parameter, optimizer = one_matrix(start)
        parameter.grad = torch.full((6, 6), torch.nan)
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        optimizer.step()
        momentum = optimizer.state[parameter]["momentum"]
        assert torch.equal(parameter.detach(), start) == (flag == 1.0)
        assert bool(torch.isfinite(momentum).all()) == (flag == 1.0)


def test_all_other_parameters_get_plain_adamw() -> None:
    torch.manual_seed(0)
    module, twin = module_of(SMALL[1]), module_of(SMALL[1])
    twin.load_state_dict(module.state_dict())
    optimizer = build_optimizer(module, config=MUON)
    orthogonal = {id(p) for group in optimizer.param_groups if group.get("orthogonal") for p in group["params"]}
    for name, parameter in module.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        twin.get_parameter(name).grad = parameter.grad.clone()
    optimizer.step()
    oracle = torch.optim.AdamW(parameter_groups(twin, config=OptimizerConfig(lr=1e-2, weight_decay=0.1)), lr=1e-2)
    oracle.step()
    for name, parameter in module.named_parameters():
        if id(parameter) not in orthogonal:
            assert torch.allclose(parameter, twin.get_parameter(name), atol=1e-6), name
