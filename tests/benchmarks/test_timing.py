"""The benchmarks' clock: turns are taken, quartiles are right, CPU time is CPU time, records can be read back."""

from __future__ import annotations

import json
import mmap
import statistics
import time
from pathlib import Path

import pytest
import timing
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.telemetry.memory import reset_host_peak


def test_variants_take_turns() -> None:
    calls: list[str] = []
    rows = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in rows.items()} == {"a": 3, "b": 3}


def test_device_is_waited_for_before_and_after() -> None:
    order: list[str] = []
    timing.measure(lambda: order.append("work"), synchronize=lambda: order.append("wait"))
    assert order == ["wait", "work", "wait"]


def test_sleeping_takes_wall_time_but_no_cpu_time() -> None:
    slept = timing.measure(lambda: time.sleep(0.05))
    assert slept.wall_s >= 0.05
    assert slept.cpu_s < 0.04

    def burn() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    assert timing.measure(burn).cpu_s >= 0.05


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50))
def test_spread_is_ordered_and_within_the_values(values: list[float]) -> None:
    result = timing.spread(values)
    assert min(values) <= result.low <= result.median <= result.high <= max(values)
    assert result.median == pytest.approx(statistics.median(values))
    assert result.repeats == len(values)
    assert result.iqr >= 0.0


def test_spread_of_known_values() -> None:
    assert timing.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == timing.Spread(3.0, 2.0, 4.0, 5)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no measurements"):
        timing.spread([])


def test_peak_memory_sees_an_allocation() -> None:
    reset_host_peak()
    before = timing.peak_rss_gib()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages, whatever the allocator keeps
        block.write(b"x" * len(block))
    assert timing.peak_rss_gib() >= before + 0.05


def test_record_says_where_and_with_what(tmp_path: Path) -> None:
    path = tmp_path / "records" / "machine.json"
    timing.write_record(path, name="example", rows=[{"preset": "vit", "pairs_per_second": 1.5}], settings={"repeats": 3})
    record = json.loads(path.read_text())
    assert (record["format"], record["benchmark"], record["settings"]) == (timing.RECORD_FORMAT, "example", {"repeats": 3})
    assert record["rows"] == [{"preset": "vit", "pairs_per_second": 1.5}]
    assert record["environment"]["cpu"]
    assert record["environment"]["cpus_usable"] >= 1
    assert "torch" in record["environment"]["versions"]
    assert {"commit", "load_average", "platform", "python", "time"} <= record["environment"].keys()
