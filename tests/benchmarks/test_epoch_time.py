"""The benchmark's own checks: the plan, the table, and a verification that wrong losses do not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import epoch_time
import pytest
import torch
from reference_loss import bank_loss, infonce_loss
from training_rows import Bench

from pairclip_fast.config import LossConfig
from pairclip_fast.data.sources import shapes
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.losses import ContrastiveLoss

TINY = {"model": {"architecture": "tile_conv", "width": 4}, "train": {"batch_size": 16, "device": "cpu"}}


def row(**changes: Any) -> dict[str, Any]:
    """A finished row as `Bench.measure` gives it."""
    return {
        "device": "cpu",
        "preset": "vit",
        "batch_size": 128,
        "precision": "fp32",
        "extrapolated": True,
        "pairs_per_second": 1_000.0,
        "epoch_s": 50.0,
        "epoch_s_low": 45.0,
        "epoch_s_high": 60.0,
        "tflops": 0.05,
        "peak_tflops": 0.1,
        "data_wait_fraction": 0.01,
        "peak_rss_gib": 1.5,
        "cuda_peak_gib": None,
    } | changes


def test_default_plan_is_every_preset_at_its_own_batch_and_the_reports() -> None:
    rows = epoch_time.plan_rows(epoch_time.arguments([]), cuda=False)
    assert {(r.preset, r.batch_size) for r in rows if r.preset in ("baseline", "enhanced")} == {("baseline", 32), ("enhanced", 32)}
    assert len({(r.preset, r.batch_size) for r in rows if r.preset in ("vit", "fast")}) == 4
    assert {r.device for r in rows} == {"cpu"}
    assert {r.device for r in epoch_time.plan_rows(epoch_time.arguments([]), cuda=True)} == {"cpu", "cuda"}


def test_plan_follows_the_flags() -> None:
    asked = epoch_time.arguments(["--preset", "fast", "--batch-size", "8", "64", "8", "--device", "cuda"])
    assert [(r.device, r.preset, r.batch_size) for r in epoch_time.plan_rows(asked, cuda=True)] == [
        ("cuda", "fast", 8),
        ("cuda", "fast", 64),
    ]


def test_rows_train_as_the_flag_amp_does() -> None:
    config = epoch_time.Row(device="cpu", preset="enhanced", batch_size=8).config()
    assert (config.train.amp, config.train.device, config.train.batch_size, config.preset) == (True, "cpu", 8, "enhanced")


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert epoch_time.main(["--batch-size", "1"]) == 2
    assert "batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leaving:
        epoch_time.main(["--preset", "nothing"])
    assert leaving.value.code == 2


def test_table_says_what_was_not_measured_and_what_is_a_claim() -> None:
    text = "\n".join(epoch_time.table([row(), row(preset="fast", peak_tflops=0.2)], cuda=False) + epoch_time.footnotes([row()]))
    assert "0.83 [0.75, 1.00]" in text
    assert "25%" in text  # of the better of the two peaks
    assert "50%" not in text
    assert "not measured" in text
    assert text.count("(claim)") == len(epoch_time.REPORT_CLAIMS) == 4
    assert "extrapolated" in text
    assert "of whole epochs" in "\n".join(epoch_time.footnotes([row(extrapolated=False)]))
    assert "not measured" not in "\n".join(epoch_time.table([row(device="cuda", cuda_peak_gib=2.0)], cuda=True))


def test_row_seconds_stay_within_bounds() -> None:
    assert epoch_time.row_seconds(left_s=1_000.0, rows=1) == epoch_time.MOST_ROW_SECONDS
    assert epoch_time.row_seconds(left_s=-5.0, rows=3) == epoch_time.LEAST_ROW_SECONDS
    assert epoch_time.row_seconds(left_s=60.0, rows=6) == 10.0


@pytest.mark.parametrize("kind", ["bank", "infonce"])
def test_reference_losses_agree_with_the_trainers_and_not_with_wrong_ones(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    bank = torch.nn.functional.normalize(torch.randn(11, 6, generator=generator, dtype=torch.float64), dim=1)
    bank[7] = bank[2]
    groups = torch.arange(11).index_fill(0, torch.tensor([7]), 2)
    features = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator, dtype=torch.float64), dim=1)
    caption_ids = torch.tensor([2, 7, 0, 2, 10])
    smoothing = 0.1 if kind == "bank" else 0.0
    config = LossConfig(kind="bank" if kind == "bank" else "infonce", temperature=0.1, label_smoothing=smoothing)
    got = float(ContrastiveLoss(config, bank=bank, groups=groups).double()(features, caption_ids).detach())

    def expected(*, groups: torch.Tensor, scale: float = 10.0, label_smoothing: float = smoothing) -> float:
        if kind == "infonce":
            return float(infonce_loss(features, bank, caption_ids, groups=groups, scale=scale))
        return float(bank_loss(features, bank, caption_ids, groups=groups, scale=scale, label_smoothing=label_smoothing))

    assert got == pytest.approx(expected(groups=groups), rel=1e-6)
    assert got != pytest.approx(expected(groups=groups, scale=9.0), rel=1e-3)
    wrong_groups = torch.arange(11) if kind == "infonce" else torch.zeros(11, dtype=torch.int64)
    assert got != pytest.approx(expected(groups=wrong_groups), rel=1e-4)
    if kind == "bank":
        assert got != pytest.approx(expected(groups=groups, label_smoothing=0.0), rel=1e-3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "TRAIN_IMAGES", 400)
        patch.setattr(shapes, "TEST_IMAGES", 100)
        return Bench(tmp_path_factory.mktemp("bench") / "data", pairs=64, epoch_pairs=1_000, events=EventLog(console=False))


def test_a_tiny_row_is_measured_from_verified_steps(bench: Bench, tmp_path: Path) -> None:
    config = epoch_time.overlay(epoch_time.load_preset("fast"), TINY, where="test")
    measured = bench.measure(config, budget_s=0.5)
    assert json.loads(json.dumps(measured)) == measured
    assert measured["epoch_s"] == pytest.approx(1_000 / measured["pairs_per_second"])
    assert measured["epoch_s_low"] <= measured["epoch_s"] <= measured["epoch_s_high"]
    assert measured["repeats"] >= 3
    assert measured["extrapolated"]
    assert 0.0 <= measured["data_wait_fraction"] <= 1.0
    assert measured["loss"] == pytest.approx(measured["reference_loss"], rel=1e-4)
    assert measured["tflops"] == pytest.approx(measured["pairs_per_second"] * measured["gflop_per_pair"] / 1e3)
    whole = bench.measure(config, budget_s=None)
    assert (whole["repeats"], whole["steps_per_repeat"], whole["extrapolated"]) == (1, 4, False)


def test_nothing_is_timed_when_the_loss_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ContrastiveLoss.forward

    def wrong(self: ContrastiveLoss, *arguments: Any, **named: Any) -> torch.Tensor:
        return right(self, *arguments, **named) * 1.01

    monkeypatch.setattr(ContrastiveLoss, "forward", wrong)
    config = epoch_time.overlay(epoch_time.load_preset("fast"), TINY, where="test")
    with pytest.raises(NumericsError, match="not that of the reference"):
        bench.measure(config, budget_s=0.5)
