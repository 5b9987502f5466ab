"""The memory ledger: exact where tensors can be counted, measured beside it, and silent (not zero) where nothing is known."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pairclip_fast.events import read_events
from pairclip_fast.models import tower
from pairclip_fast.models.blocks import Block
from pairclip_fast.native import native
from pairclip_fast.telemetry import memory
from pairclip_fast.telemetry.memory import GIB, MemoryReading, host_memory, host_pss, host_reading
from pairclip_fast.telemetry.memory_ledger import MemoryLedger, explained_peak
from pairclip_fast.train.accounting import optimizer_bytes, tensors_of, unique_bytes
from pairclip_fast.train.device import Placement
from pairclip_fast.train.optimizer import build_optimizer

MIB = 2**20
CLOSE = 0.02


class Readings:
    """A device that holds what the test says."""

    def __init__(self) -> None:
        self.allocated: int | None = 0
        self.outside: int | None = None
        self.peak = 0
        self.forgotten = 0

    def read(self) -> MemoryReading:
        if self.allocated is not None:
            self.peak = max(self.peak, self.allocated)
        return MemoryReading(allocated=self.allocated, reserved=self.allocated, peak=self.peak, outside=self.outside)

    def forget(self) -> None:
        self.forgotten += 1
        self.peak = 0


def first_epoch(ledger: MemoryLedger, device: Readings, *, sizes: dict[str, int]) -> None:
    """Walk through the points with these sizes."""
    assert device.allocated is not None
    device.allocated += sizes["model"]
    ledger.note("model")
    ledger.note("ready")
    for phase, change in (
        ("copy", sizes["loader"]),
        ("forward", sizes["activations"] // 2),
        ("loss", sizes["activations"] - sizes["activations"] // 2),
        ("backward", sizes["gradients"] - sizes["activations"]),
        ("optimizer", sizes["optimizer"]),
        ("copy", 1000),  # a later step is not the first
        ("loss", 1000),
    ):
        device.allocated += change
        ledger.note_lap(phase)  # type: ignore[arg-type]
    ledger.note("training")


SIZES = {"model": 100, "loader": 7, "activations": 500, "gradients": 90, "optimizer": 180}


def test_rows_are_the_growth_of_the_first_step() -> None:
    device = Readings()
    device.allocated = 40
    ledger = MemoryLedger(read=device.read, forget_peak=device.forget)
    first_epoch(ledger, device, sizes=SIZES)
    rows = {row.item: row for row in ledger.rows({**SIZES, "activations": 450})}
    assert {item: row.measured for item, row in rows.items()} == {"process": 40} | SIZES
    assert rows["activations"].unexplained == 50
    assert rows["gradients"].unexplained == 0
    assert rows["process"].unexplained is None
    assert device.forgotten == 1, "the peak of planning is not the training's"
    told = ledger.to_json(SIZES)
    assert told["explained_gib"] * GIB == 40 + 100 + 7 + 180 + 500
    assert told["unexplained_gib"] == told["peak_gib"] - told["explained_gib"]


def test_what_a_gpu_holds_outside_of_torch_when_the_loader_starts_is_the_loaders() -> None:
    device = Readings()
    device.outside = 300  # the context
    ledger = MemoryLedger(read=device.read, forget_peak=device.forget)
    for point, grown in (("ready", 0), ("copy", 39), ("loss", 5)):  # what the kernels of the forward pass take is not the loader's
        device.outside += grown
        ledger.note(point)  # type: ignore[arg-type]
    rows = [row for row in ledger.rows(SIZES) if row.item == "loader's pools"]
    assert [(row.counted, row.measured) for row in rows] == [(None, 39)]


def test_a_gpu_is_read_beside_torchs_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"memory_allocated": 20, "memory_reserved": 30, "max_memory_reserved": 35, "mem_get_info": (500, 1000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    reading = Placement(torch.device("cuda", 0), "stand-in").memory_reading()
    assert reading == MemoryReading(allocated=20, reserved=30, peak=35, outside=470)


@pytest.mark.skipif(native().module is None, reason=native().reason)
def test_what_is_kept_for_the_next_step_is_not_in_use_and_can_be_given_back() -> None:
    placement = Placement(torch.device("cpu"), "stand-in")
    placement.give_back()
    blocks = nn.ModuleList([Block(64, heads=2, mlp_width=64, activation="gelu", pre_norm=True)])
    tokens = torch.randn(64, 33, 64, requires_grad=True)
    tower.run(blocks, tokens, engine="portable").sum().backward()  # gradients are there now
    placement.give_back()
    before = placement.memory_reading().allocated
    tower.run(blocks, tokens, engine="portable").sum().backward()
    kept, after = tower.free_workspace_bytes(), placement.memory_reading().allocated
    assert before is not None
    assert after is not None
    assert abs(after - before) < kept / 10
    placement.give_back()
    assert tower.free_workspace_bytes() == 0


def test_laps_before_the_first_step_are_no_points() -> None:
    device = Readings()
    ledger = MemoryLedger(read=device.read, forget_peak=device.forget)
    ledger.note_lap("loss")  # the probe's
    assert set(ledger.points) == {"start"}


def test_what_cannot_be_read_is_empty_and_not_zero() -> None:
    device = Readings()
    device.allocated = None
    ledger = MemoryLedger(read=device.read, forget_peak=device.forget)
    for point in ("model", "ready", "copy", "loss", "backward", "optimizer", "training"):
        ledger.note(point)  # type: ignore[arg-type]
    assert {row.measured for row in ledger.rows(SIZES)} == {None}
    told = ledger.to_json(SIZES)
    assert told["explained_gib"] is None
    assert told["unexplained_gib"] is None
    assert all(row["unexplained_gib"] is None for row in told["rows"])


def test_gradients_count_where_they_outweigh_the_activations() -> None:
    assert explained_peak(10, {"activations": 5, "gradients": 8, "optimizer": 2}) == 20
    assert explained_peak(None, {"activations": 5}) is None


def test_the_host_counts_allocations_and_frees() -> None:
    gc.collect()
    if host_reading().allocated is None:
        pytest.skip("no mallinfo2: not glibc 2.33 or later")
    errors = []
    for _ in range(5):  # threads of other tests may allocate in between
        before = host_reading()
        block = torch.ones(16 * MIB)
        during = host_reading()
        del block
        after = host_reading()
        assert before.allocated is not None
        assert during.allocated is not None
        assert after.allocated is not None
        errors.append(max(abs(during.allocated - before.allocated - 64 * MIB), abs(after.allocated - before.allocated)))
    assert min(errors) < CLOSE * 64 * MIB
    assert during.peak is not None
    assert during.reserved is not None
    assert during.peak >= during.reserved > 0


def test_pss_is_at_most_the_resident_memory() -> None:
    pss, reading = host_pss(), host_reading()
    assert pss is not None
    assert reading.reserved is not None
    assert 0 < pss <= 1.05 * reading.reserved


def test_no_kernel_files_no_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATUS", "CLEAR_REFS", "SMAPS_ROLLUP"):
        monkeypatch.setattr(memory, name, tmp_path / "nowhere" / name)
    assert (host_reading().reserved, host_reading().peak, host_pss(), memory.reset_host_peak()) == (None, None, None, False)
    assert set(host_memory()) == {"rss_gib"}


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_optimizer_state_is_counted_before_it_exists(kind: Any) -> None:
    from pairclip_fast.config import OptimizerConfig

    module = nn.ModuleDict({"stem": nn.Linear(30, 40), "blocks": nn.ModuleList([nn.Linear(40, 50)])})
    wrapped = nn.ModuleDict({"encoder": module})
    optimizer = build_optimizer(wrapped, config=OptimizerConfig(kind=kind))
    expected = optimizer_bytes(optimizer)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(value.nbytes for entry in optimizer.state.values() for key, value in entry.items() if key != "step")
    assert state == expected


def test_a_shared_storage_counts_once() -> None:
    module = nn.Linear(10, 10, bias=False)
    twin = nn.Linear(10, 10, bias=False)
    twin.weight = module.weight
    module.bank = torch.zeros(5)  # type: ignore[assignment]
    assert unique_bytes([*tensors_of(module), *tensors_of(twin), module.weight.T]) == 400 + 20


@pytest.fixture
def told(data: Path, tmp_path: Path, write_config: Callable[..., Path], train_alone: Callable[..., str]) -> dict[str, Any]:
    """The `memory` event of a run with a model large enough to be measured, in a process of its own, as memory belongs to processes."""
    changes = {"model.width": 512, "model.mlp_width": 4096, "model.patch_size": 8, "train.epochs": 2}
    train_alone("--data", str(data), "--out", str(tmp_path / "run"), "--config", str(write_config(tmp_path, changes)))
    events = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "memory"]
    assert len(events) == 1, "once per attempt"
    return dict(events[0])


@pytest.mark.timeout(180)
def test_a_run_on_a_cpu_is_explained(told: dict[str, Any]) -> None:
    rows = {row["item"]: row for row in told["rows"]}
    assert told["device"] == "cpu"
    for item in ("gradients", "optimizer"):
        assert rows[item]["measured_gib"] == pytest.approx(rows[item]["counted_gib"], rel=0.15), item
    assert rows["activations"]["measured_gib"] == pytest.approx(rows["activations"]["counted_gib"], rel=0.3)
    assert 0 < rows["process"]["measured_gib"] <= told["peak_gib"] <= told["peak_with_evaluation_gib"]
    assert 0.8 * told["peak_gib"] < told["explained_gib"] < 1.1 * told["peak_gib"]
    assert told["unexplained_gib"] == pytest.approx(told["peak_gib"] - told["explained_gib"])
