"""The benchmark's own checks: the plan, the table, and a verification that wrong losses do not pass."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import epoch_time
import msgspec
import pytest
import torch
from epoch_records import EpochRow, merge, read_record
from epoch_tables import REPORT_CLAIMS, measured_table, memory_table, step_cost
from reference_loss import bank_loss, infonce_loss
from training_rows import Bench

from pairclip_fast.config import LossConfig, load_preset
from pairclip_fast.data.sources import shapes
from pairclip_fast.errors import DataError, NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.gpus import GPUS
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import build_model
from pairclip_fast.telemetry.flops import model_cost
from pairclip_fast.telemetry.roofline import least_seconds

TINY = {"model": {"architecture": "tile_conv", "width": 4}, "train": {"batch_size": 16, "device": "cpu"}}


def row(**changes: Any) -> EpochRow:
    """A finished row as `Bench.measure` gives it."""
    rate, gflop = changes.get("pairs_per_second", 1_000.0), changes.get("gflop_per_pair", 0.05)
    fields: dict[str, Any] = {
        "machine": "Example CPU (2 threads)",
        "device": "cpu",
        "preset": "vit",
        "epochs": 8,
        "batch_size": 128,
        "precision": "fp32",
        "loader": "reference",
        "compile": "eager",
        "compile_s": 0.0,
        "parameters": 650_000,
        "gflop_per_pair": gflop,
        "repeats": 5,
        "steps_per_repeat": 10,
        "extrapolated": True,
        "pairs_per_second": rate,
        "pairs_per_second_low": rate * 0.9,
        "pairs_per_second_high": rate * 1.2,
        "epoch_pairs": 50_000,
        "epoch_s": 50_000 / rate,
        "epoch_s_low": 45_000 / rate,
        "epoch_s_high": 60_000 / rate,
        "tflops": rate * gflop / 1e3,
        "peak_tflops": 0.1,
        "data_wait_fraction": 0.01,
        "time_share": {"forward": 0.25, "backward": 0.75},
        "cpu_s_per_wall_s": 1.9,
        "held_gib": 0.5,
        "training_peak_gib": 1.5,
        "evaluation_peak_gib": 0.75,
        "disk_bytes": 2_600_000,
        "counted_gib": {"model": 0.25, "activations": 0.5},
        "loss": 9.21,
        "reference_loss": 9.2101,
    }
    return EpochRow(**(fields | changes))


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


def printed(*rows: EpochRow, missing_gpu: bool = True) -> str:
    return "\n".join(table.text() for table in epoch_time.tables(rows, presets=["vit"], missing_gpu=missing_gpu))


def test_tables_say_what_was_not_measured_what_is_a_claim_and_what_an_estimate() -> None:
    text = printed(row(), row(preset="fast", peak_tflops=0.2))
    assert "0.83 [0.75, 1.00]" in text
    assert "6.7 min" in text, "eight epochs"
    assert "25%" in text, "of the better of the two peaks"
    assert "50%" not in text
    assert re.search(r"any GPU +all +not measured", text)
    assert text.count("(claim)") == len(REPORT_CLAIMS) == 4
    assert re.search(r"RTX 3080 +32 +~3 \(claim\) +~1 h +278 ", text), "50,000 pairs in three minutes"
    assert "Estimates, not measured" in text
    assert "extrapolated" in text
    assert "of whole epochs" in printed(row(extrapolated=False))
    assert "any GPU" not in printed(row(device="cuda", machine="Example GPU"), missing_gpu=False)


def test_no_gpu_has_a_measured_cell_without_a_row() -> None:
    measured = measured_table([row()], missing_gpu=True)
    assert all(not any(gpu.name in cell for gpu in GPUS) for line in measured.rows for cell in line)
    assert all(cell == "" for cell in measured.rows[-1][5:])


def test_memory_stands_beside_the_reports() -> None:
    table = memory_table([row(), row(training_peak_gib=None)])
    assert table.rows[0][1:] == ("650,000", "2.6 MB", "256 MiB", "", "", "512 MiB", "1.50 GiB (1.00)", "0.75 GiB (0.25)")
    assert table.rows[1][-2:] == ("", "0.75 GiB (0.25)"), "what could not be read is empty, not zero"
    assert table.rows[-1][0] == "the report's claim"


def test_markdown_has_the_same_cells() -> None:
    table = measured_table([row(machine="odd | name")], missing_gpu=True)
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(table.columns) + 2}


def test_the_roofline_is_a_lower_bound_and_counts_what_the_flop_counter_counts() -> None:
    cost = step_cost("vit", 4)
    preset = load_preset("vit")
    model = build_model(preset.model, tiles=2, tile_size=(32, 32), dim=preset.bank.rank)
    assert cost.gflop_per_pair * 1e9 == pytest.approx(model_cost(model, image_shape=(3, 32, 64), num_captions=10_000).training_flops)
    slow, fast = GPUS[0], GPUS[-1]
    least = {gpu.name: least_seconds(cost.work, gpu, parameters=cost.parameters) for gpu in GPUS}
    assert least[slow.name] > least[fast.name]
    for gpu in GPUS:
        assert least[gpu.name] >= 4 * cost.gflop_per_pair / 1e3 / gpu.tflops, gpu.name
        assert least[gpu.name] >= sum(one.bytes for one in cost.work if not one.flops) / gpu.bandwidth_gb_s / 1e9, gpu.name
        assert gpu.source


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
    assert msgspec.convert(json.loads(json.dumps(dataclasses.asdict(measured))), EpochRow) == measured
    assert measured.epoch_s == pytest.approx(1_000 / measured.pairs_per_second)
    assert measured.epoch_s_low <= measured.epoch_s <= measured.epoch_s_high
    assert measured.repeats >= 3
    assert measured.extrapolated
    assert {"wait", "forward", "backward", "optimizer"} <= set(measured.time_share)
    assert measured.training_peak_gib > measured.held_gib > 0  # type: ignore[operator]
    assert measured.disk_bytes >= 4 * measured.parameters
    assert measured.loss == pytest.approx(measured.reference_loss, rel=1e-4)
    assert measured.tflops == pytest.approx(measured.pairs_per_second * measured.gflop_per_pair / 1e3)
    whole = bench.measure(config, budget_s=None)
    assert (whole.repeats, whole.steps_per_repeat, whole.extrapolated) == (1, 4, False)


def test_nothing_is_timed_when_the_loss_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ContrastiveLoss.forward

    def wrong(self: ContrastiveLoss, *arguments: Any, **named: Any) -> torch.Tensor:
        return right(self, *arguments, **named) * 1.01

    monkeypatch.setattr(ContrastiveLoss, "forward", wrong)
    config = epoch_time.overlay(epoch_time.load_preset("fast"), TINY, where="test")
    with pytest.raises(NumericsError, match="not that of the reference"):
        bench.measure(config, budget_s=0.5)


def record(*rows: EpochRow) -> dict[str, Any]:
    """A whole record as JSON values."""
    return {"format": 2, "benchmark": "epoch_time", "settings": {}, "environment": {}, "rows": [dataclasses.asdict(one) for one in rows]}


@pytest.fixture
def send(tmp_path: Path) -> Callable[..., Path]:
    """Write a record to a file."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def test_records_of_many_machines_make_one_table(send: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = send("one.json", record(row(), row(preset="fast")))
    gpu = row(
        device="cuda",
        machine="Example GPU",
        pairs_per_second=9_000.0,
        peak_tflops=50.0,
        precision="bf16",
        compile="compiled",
        compile_s=12.5,
    )
    two = send("two.json", record(gpu, row(pairs_per_second=1_100.0)))
    rows, refused = merge([one, two])
    assert refused == []
    assert [(r.machine, r.preset, r.pairs_per_second) for r in rows] == [
        ("Example CPU (2 threads)", "fast", 1_000.0),
        ("Example CPU (2 threads)", "vit", 1_100.0),  # the later record of the same configuration
        ("Example GPU", "vit", 9_000.0),
    ]
    markdown, plot = tmp_path / "out" / "table.md", tmp_path / "out" / "rates.svg"
    assert epoch_time.main(["--merge", str(one), str(two), "--markdown", str(markdown), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "Example GPU" in text
    assert "12.5 s" in text
    assert "any GPU" not in text
    assert "| Example GPU |" in markdown.read_text()
    assert "<svg" in plot.read_text()


def test_minimal_filtering_may_count_more_than_the_peak(send: Callable[..., Path]) -> None:
    assert read_record(send("filtered.json", record(row(peak_tflops=0.02)))).rows[0].peak_tflops == 0.02


WRONG: dict[str, dict[str, Any]] = {
    "faster than its own peak": {"peak_tflops": 0.005},
    "time and rate disagree": {"epoch_s": 49.0},
    "work and rate disagree": {"tflops": 0.06},
    "outside its spread": {"epoch_s_high": 48.0},
    "phases that do not sum": {"time_share": {"forward": 0.5}},
    "another loss": {"loss": 5.0},
    "a rate of nothing": {"pairs_per_second": 0.0},
    "a number as text": {"pairs_per_second": "1000"},
    "an unknown device": {"device": "tpu"},
    "a share above one": {"data_wait_fraction": 1.5},
    "an endless name": {"machine": "x" * 1_000},
    "not a number": {"epoch_s": float("nan")},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_a_record_that_cannot_be_true_is_refused_and_the_others_are_shown(
    send: Callable[..., Path], capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    value = record(row())
    value["rows"][0] |= change
    wrong, right = send("wrong.json", value), send("right.json", record(row(machine="Honest CPU")))
    with pytest.raises(DataError, match="believed"):
        read_record(wrong)
    assert epoch_time.main(["--merge", str(wrong), str(right)]) == 3
    said = capsys.readouterr()
    assert "Honest CPU" in said.out
    assert "wrong.json" in said.err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "benchmark": "epoch_time", "rows": []}', "[" * 100_000, "nonsense"])
def test_what_is_no_record_is_refused(send: Callable[..., Path], text: str) -> None:
    with pytest.raises(DataError):
        read_record(send("odd.json", text))


def test_a_missing_or_endless_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path / "nowhere.json")
    (tmp_path / "long.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(DataError, match="too long"):
        read_record(tmp_path / "long.json")


def test_control_characters_of_a_record_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in printed(row(machine="\x1b[31mred", preset="\x1b]0;title"))


@pytest.mark.parametrize("words", [["--merge", "a.json", "--full"], ["--merge", "a.json", "--json", "b.json"], ["--plot", "rates.txt"]])
def test_options_that_do_not_go_together(words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        epoch_time.main(words)
    assert leaving.value.code == 2


def test_a_table_that_cannot_be_written_is_said_and_not_a_traceback(
    send: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--merge", str(send("one.json", record(row()))), "--plot", str(tmp_path / "file" / "rates.svg")]
    assert epoch_time.main(words) == 8
    said = capsys.readouterr()
    assert "Measured" in said.out, "what was printed stays"
    assert "epoch_time.py:" in said.err
