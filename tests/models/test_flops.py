"""The FLOP ledger: pinned for the report's model, checked by hand for the others, untouched models."""

from __future__ import annotations

import pytest
import torch

from pairclip_fast.config import ModelConfig, TileConvConfig, TileViTConfig, ViTConfig
from pairclip_fast.models.build import build_model
from pairclip_fast.telemetry.flops import model_cost, training_flops_per_pair

SHAPE = (3, 32, 64)


def test_the_reports_model() -> None:
    with torch.device("meta"):
        model = build_model(ViTConfig(), tiles=2, tile_size=(32, 32), dim=512)
    cost = model_cost(model, image_shape=SHAPE, num_captions=0)
    patches, head = 2 * 32 * 192 * 512, 2 * 512 * 512
    block = 2 * 33 * (4 * 512**2 + 2 * 512 * 2048) + 4 * 33 * 33 * 512
    assert cost.forward_flops == patches + 6 * block + head
    assert cost.forward_flops / 1e9 == pytest.approx(1.265, abs=1e-3)
    # The pictures need no gradient, everything else costs twice its forward.
    assert cost.training_flops == 3 * cost.forward_flops - patches
    assert cost.training_flops / 1e9 == pytest.approx(3.80, abs=0.015)
    assert (cost.parameters, cost.head_parameters) == (19_293_696, 262_656)


def test_the_bank_costs_two_products() -> None:
    model = build_model(TileConvConfig(width=4), tiles=2, tile_size=(32, 32), dim=16)
    without = training_flops_per_pair(model, image_shape=SHAPE, num_captions=0)
    assert training_flops_per_pair(model, image_shape=SHAPE, num_captions=1000) - without == 4 * 1000 * 16


@pytest.mark.parametrize("residuals", [0, 1, 2])
def test_the_convolutional_model_by_hand(residuals: int) -> None:
    width = 8
    with torch.device("meta"):
        model = build_model(TileConvConfig(width=width, residuals=residuals), tiles=2, tile_size=(32, 32), dim=16)
    stem = 12 * 24 * 31**2
    multiply_adds, channels, side = stem, 24, 31
    for wide in (width, 4 * width, 4 * width):
        refined = 1 + (residuals if wide > width else 0)
        multiply_adds += 9 * channels * wide * side**2 + refined * 9 * wide**2 * (side // 2) ** 2
        channels, side = wide, side // 2
    cost = model_cost(model, image_shape=SHAPE, num_captions=0)
    assert cost.forward_flops == 2 * (2 * multiply_adds + 8 * width * 16)
    # The stem is fixed: no gradient to the pictures, none to its filters.
    assert cost.training_flops == 3 * cost.forward_flops - 2 * 2 * 2 * stem


@pytest.mark.parametrize("config", [TileViTConfig(depth=1), ViTConfig(width=64, depth=1, heads=2, mlp_width=64)])
def test_frozen_parts_cost_no_weight_gradient(config: ModelConfig) -> None:
    model = build_model(config, tiles=2, tile_size=(32, 32), dim=16)
    free = model_cost(model, image_shape=SHAPE, num_captions=0)
    model.encoder.requires_grad_(False)
    frozen = model_cost(model, image_shape=SHAPE, num_captions=0)
    assert frozen.forward_flops == free.forward_flops
    assert frozen.training_flops < 1.01 * frozen.forward_flops
    assert next(model.parameters()).device.type == "cpu"
