"""The time ledger: every moment in one phase, no more than one, and a bottleneck that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pairclip_fast.data.loader import PlannedLoader
from pairclip_fast.events import read_events
from pairclip_fast.telemetry import timing
from pairclip_fast.telemetry.bottleneck import ADVICE, TOLERABLE, find_bottleneck
from pairclip_fast.telemetry.memory import host_memory
from pairclip_fast.telemetry.time_ledger import PHASES, Phase, TimeLedger, TimeTotals, lap_cost_s
from pairclip_fast.telemetry.timing import StepMeter, peak_tflops, words_for_seconds
from pairclip_fast.train import probing, runner
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.device import Placement
from pairclip_fast.train.options import TrainOptions

CLOSE = 0.03
"""How far the phases may be from the wall time."""
SLICE_SECONDS = 0.02
"""And how far in any case: a turn of the scheduler between the last lap and the clock, which in a run of 0.2 s is more than `CLOSE`."""


class StandInEvent:
    """Stands for a CUDA event: a time in milliseconds, known only once the device has got there."""

    now_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = StandInEvent.now_ms

    def elapsed_time(self, later: StandInEvent) -> float:
        return later.at_ms - self.at_ms


def test_phases_sum_to_the_time_that_passed() -> None:
    now = [10.0]
    ledger = TimeLedger(mark=lambda: now[0])
    for step in range(3):
        for number, phase in enumerate(PHASES):
            now[0] += 0.5 + number + step
            ledger.lap(phase)
    now[0] += 100.0
    reading = ledger.read()
    assert sum(reading.values()) == pytest.approx(now[0] - 100.0 - 10.0)
    assert reading["wait"] == pytest.approx(0.5 * 3 + 0 + 1 + 2)
    ledger.lap("other")
    assert ledger.read() == {"other": pytest.approx(100.0)}, "what came after the last lap belongs to the next reading"
    assert ledger.laps == 3 * len(PHASES) + 1


def test_a_restart_forgets_what_was_not_read() -> None:
    now = [0.0]
    ledger = TimeLedger(mark=lambda: now[0])
    now[0] = 5.0
    ledger.lap("wait")
    ledger.restart()
    now[0] = 6.0
    ledger.lap("copy")
    assert ledger.read() == {"copy": 1.0}


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    placement = Placement(torch.device("cuda", 0), "stand-in")
    ledger = TimeLedger(mark=placement.mark, between=placement.seconds_between)
    for phase in ("forward", "backward"):
        StandInEvent.now_ms += 250.0
        ledger.lap(phase)  # type: ignore[arg-type]
    assert ledger.read() == {"forward": 0.25, "backward": 0.25}


def test_observers_are_told_every_lap() -> None:
    told: list[Phase] = []
    ledger = TimeLedger()
    ledger.observers.append(told.append)
    ledger.lap("forward")
    ledger.lap("loss")
    assert told == ["forward", "loss"]


def test_a_lap_is_cheap() -> None:
    ledger = TimeLedger()
    assert 0.0 < min(lap_cost_s(ledger) for _ in range(5)) < 50e-6
    assert ledger.read() == {}, "measuring the cost leaves no lap behind"


@pytest.mark.parametrize(
    ("shares", "phase"),
    [
        ({"wait": 0.2, "forward": 0.3, "backward": 0.5}, "wait"),
        ({"wait": 0.04, "forward": 0.3, "backward": 0.66}, "backward"),
        ({"forward": 0.6, "backward": 0.4}, "forward"),
        ({"evaluation": 0.5, "wait": 0.2, "backward": 0.3}, "evaluation"),
        ({"telemetry": 0.5, "backward": 0.5}, "telemetry"),
    ],
)
def test_the_bottleneck_is_what_takes_more_than_it_should(shares: dict[Phase, float], phase: Phase) -> None:
    found = find_bottleneck(shares)
    assert found is not None
    assert (found.phase, found.share, found.advice) == (phase, shares[phase], ADVICE[phase])


def test_every_phase_has_advice_and_nothing_has_no_bottleneck() -> None:
    assert set(ADVICE) == set(get_args(Phase)) == set(TOLERABLE) | {"forward", "backward"}
    assert find_bottleneck({}) is None
    assert TimeTotals().shares() == {}


@pytest.fixture
def tiny(data: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    """A run with an event for every step."""
    monkeypatch.setattr(timing, "STEP_EVENT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(timing, "PEAK_MATRIX", 64)
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.0)
    return TrainOptions(data=data, out=tmp_path / "run", config=write_config(tmp_path))


def phases_of(run: Path) -> TimeTotals:
    totals = TimeTotals()
    for event in read_events(run / "events.jsonl"):
        totals.add(event.get("time_s", {}))
    return totals


def test_the_ledger_of_a_run_sums_to_its_wall_time(tiny: TrainOptions, tmp_path: Path) -> None:
    result = run_train(tiny)
    totals = phases_of(tmp_path / "run")
    assert totals.total_s == pytest.approx(result["seconds"], rel=CLOSE, abs=SLICE_SECONDS)
    assert set(totals.seconds) == set(PHASES) - {"resize"}
    finished = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert 0.0 < finished["telemetry_share"] < 1.0


def test_a_phase_that_nobody_laps_would_be_noticed(tiny: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong version: evaluations happen, but the ledger is restarted after them, as a meter that leaves them out would."""
    whole = runner.Runner._evaluate

    def forgotten(self: runner.Runner) -> Any:
        metrics = whole(self)
        time.sleep(0.05)
        self.trainee.ledger.restart()
        return metrics

    monkeypatch.setattr(runner.Runner, "_evaluate", forgotten)
    result = run_train(tiny)
    assert phases_of(tmp_path / "run").total_s < result["seconds"] - max(CLOSE * result["seconds"], SLICE_SECONDS)


@pytest.mark.parametrize("slow", ["loader", "backward", "checkpoint"])
def test_a_slow_part_shows_in_its_own_phase(tiny: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    seconds = 0.05

    def delayed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return call(*arguments, **named)

        return wrapper

    if slow == "loader":
        monkeypatch.setattr(PlannedLoader, "_next", delayed(PlannedLoader._next))
    elif slow == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", delayed(torch.Tensor.backward))
    else:
        monkeypatch.setattr(runner.Runner, "_save", delayed(runner.Runner._save))
    run_train(tiny)
    phase, times = {"loader": ("wait", 12), "backward": ("backward", 12), "checkpoint": ("checkpoint", 3)}[slow]
    assert phases_of(tmp_path / "run").seconds[phase] >= times * seconds  # type: ignore[index]


def test_the_meter_reads_rates_and_survives_a_clock_that_stands_still() -> None:
    now = [0.0]
    ledger = TimeLedger(mark=lambda: now[0])
    meter = StepMeter(ledger, clock=lambda: now[0])
    for phase, until in (("evaluation", 2.0), ("wait", 2.5), ("backward", 4.0)):
        now[0] = until
        ledger.lap(phase)  # type: ignore[arg-type]
    for _ in range(4):
        meter.count(8)
    assert meter.due
    rates = meter.read()
    assert (rates.steps, rates.pairs_per_second, rates.data_wait_fraction) == (4, 16.0, 0.25), "the evaluation is no part of it"
    assert rates.time_s == {"evaluation": 2.0, "wait": 0.5, "backward": 1.5}
    assert not meter.due
    assert meter.read().pairs_per_second == 0.0


def test_durations_memory_and_peak() -> None:
    assert [words_for_seconds(value) for value in (-3.0, 41.6, 200.0, 7500.0)] == ["0 s", "42 s", "3 min 20 s", "2 h 05 min"]
    memory = host_memory()
    assert 0.01 < memory["rss_gib"] <= memory["peak_rss_gib"]
    state = torch.get_rng_state()
    assert peak_tflops(torch.device("cpu"), dtype=torch.float32, synchronise=lambda: None) > 1e-3
    assert torch.equal(torch.get_rng_state(), state)
