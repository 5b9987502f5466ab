"""Recomputing activations: the same gradients, the same statistics, less kept."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from pairclip_fast.config import ModelConfig, TileConvConfig, TileViTConfig, ViTConfig
from pairclip_fast.models import encoder
from pairclip_fast.models.build import PairEncoder, build_model
from pairclip_fast.telemetry.flops import training_flops_per_pair

SHAPE = (3, 32, 64)
CONFIGS = [
    ViTConfig(width=32, depth=3, heads=2, mlp_width=64),
    TileViTConfig(width=32, depth=3, heads=2, mlp_width=64, stem_width=8),
    TileConvConfig(width=16),
]


def step(model: PairEncoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients and buffers after a forward and backward pass."""
    model.train()
    (model(images) * torch.arange(8.0)).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return gradients | dict(model.named_buffers())


def twins(config: ModelConfig) -> tuple[PairEncoder, PairEncoder]:
    torch.manual_seed(0)
    plain = build_model(config, tiles=2, tile_size=(32, 32), dim=8)
    again = copy.deepcopy(plain)
    again.encoder.recompute = True
    return plain, again


def kept_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Of what the graph of a forward pass holds on to, as the allocator sees it."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model(images)
    weights = sum(value.nbytes for value in model.parameters())
    del held
    return sum(kept.values()) - weights


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_gradients_and_statistics_are_the_same_bits(config: ModelConfig) -> None:
    plain, again = twins(config)
    images = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    one, other = step(plain, images), step(again, images)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_blocks_of_our_own_give_way_to_torch_within_rounding() -> None:
    """Heads of 32 numbers, which C++ trains where it is faster."""
    plain, again = twins(ViTConfig(width=64, depth=2, heads=2, mlp_width=64))
    images = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    one, other = step(plain, images), step(again, images)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5 * float(value.abs().max()), rtol=0.0, msg=name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_less_is_kept_and_nothing_else_changes(config: ModelConfig) -> None:
    plain, again = twins(config)
    images = torch.randn(6, *SHAPE)
    assert kept_bytes(again, images) < 0.3 * kept_bytes(plain, images)
    flops = [training_flops_per_pair(model, image_shape=SHAPE, num_captions=10) for model in (plain, again)]
    assert flops[0] == flops[1], "computing twice is not more work done for the model"
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), again.eval()(images))


def test_a_second_pass_that_moves_the_statistics_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_fixed_statistics", lambda part: contextlib.nullcontext())
    plain, again = twins(CONFIGS[2])
    images = torch.randn(6, *SHAPE)
    one, other = step(plain, images), step(again, images)
    differing = {name for name, value in one.items() if not torch.equal(value, other[name])}
    assert any("running_mean" in name for name in differing)
    assert any("num_batches_tracked" in name for name in differing)
