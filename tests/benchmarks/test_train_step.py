"""The benchmark of the training step runs, writes what it measured, and refuses to time a wrong step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import step_products
import step_text
import torch
import train_step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_rows import Bench

from pairclip_fast.config import ModelConfig, RunConfig, TileConvConfig, ViTConfig, load_preset, overlay
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models import convolution
from pairclip_fast.models.build import build_model

MODELS: dict[str, ModelConfig] = {
    "tile_conv": TileConvConfig(width=4),
    "vit": ViTConfig(width=16, depth=1, heads=2, mlp_width=32, patch_size=8),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(preset: str, *, batch_size: int | None, amp: bool) -> RunConfig:
        model = {"architecture": "vit", "width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
        return overlay(
            load_preset(preset), {"model": model, "train": {"device": "cpu", "amp": amp, "batch_size": batch_size or 40}}, where="test"
        )

    monkeypatch.setattr(train_step, "configuration", tiny)
    monkeypatch.setattr(train_step, "DATA_PAIRS", 64)
    monkeypatch.setattr(step_text, "find_minilm", lambda: None)


def test_it_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--preset", "vit", "--repeats", "2", "--threads", "1", "--json", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_bytes())
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == ["report", "report, image tower only", "eager", "autocast", "ours"]
    assert {name: row["batch_size"] for name, row in rows.items()} == {name: 32 if "report" in name else 40 for name in rows}
    for row in rows.values():
        assert row["wall_s_low"] <= row["wall_s"] <= row["wall_s_high"]
        assert row["pairs_per_second"] == pytest.approx(row["batch_size"] / row["wall_s"])
        assert row["ours_faster_by"] == pytest.approx(rows["ours"]["pairs_per_second"] / row["pairs_per_second"])
    explained = record["settings"]["explained"]["vit"]
    seconds = sum(row["seconds"] for row in explained["products"])
    assert explained["bound_pairs_per_second"] == pytest.approx(40 / seconds)
    assert {row["kind"] for row in explained["products"]} == {"forward", "input gradient", "weight gradient"}
    assert 0 < len(explained["profile"]) <= 10
    assert record["environment"]["threads"] == 1
    printed = capsys.readouterr().out
    assert "stand-in" in printed
    assert "GEMM bound" in printed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("train-step") / "data", pairs=64, epoch_pairs=64, events=EventLog())


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_step_is_not_timed(bench: Bench, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ContrastiveLoss.forward

    def spoilt(self: ContrastiveLoss, features: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        loss = right(self, features, *rest, **named)
        return loss * 1.1 if wrong == "loss" else loss.detach() + (loss - loss.detach()) * 1.1

    monkeypatch.setattr(ContrastiveLoss, "forward", spoilt)
    monkeypatch.setattr(train_step, "time_steps", None)
    config = train_step.configuration("vit", batch_size=None, amp=False)
    with pytest.raises(NumericsError, match="ours: not the loss and gradient of float64"):
        train_step.measure(bench, config, repeats=1, events=EventLog())


@pytest.mark.parametrize("name", list(MODELS))
def test_every_operation_that_torch_counts_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "ENGINES", {})  # torch's counter does not see our own weight gradient
    model = build_model(MODELS[name], tiles=2, tile_size=(32, 32), dim=12)
    found = step_products.products(model, images=(3, 3, 32, 64), captions=0)
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(3, 3, 32, 64)).sum().backward()
    assert sum(product.flop * count for product, count in found.items()) == counted.get_total_flops()


def test_the_bank_is_two_products_more() -> None:
    model = build_model(MODELS["vit"], tiles=2, tile_size=(32, 32), dim=12)
    without, found = (step_products.products(model, images=(3, 3, 32, 64), captions=n) for n in (0, 100))
    assert [product.flop for product in (found - without).elements()] == [2 * 3 * 12 * 100] * 2


def test_products_are_computed_as_the_step_asks_for_them() -> None:
    convolution = nn.Conv2d(4, 6, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    tower = nn.Sequential(convolution, nn.Flatten(), nn.Linear(6 * 8 * 8, 5))
    tower[0].weight.requires_grad_(False)
    found = step_products.products(tower, images=(2, 4, 8, 8), captions=0)
    assert Counter(product.kind for product in found) == {"forward": 2, "weight gradient": 1}
    for product in found:
        result = product.call(torch.float32)()
        kept = result if isinstance(result, torch.Tensor) else next(one for one in result if one is not None)
        assert kept.shape in {(2, 6, 8, 8), (2, 5), (5, 6 * 8 * 8)}
    (image,) = (product for product in found if product.window)
    assert image.operands[1].stride == tuple(convolution.weight.stride())
