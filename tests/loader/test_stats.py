"""What the loader counts, and the verdict on a training that waits."""

from __future__ import annotations

from pathlib import Path

from every_backend import CPU, FULL, make_named_loader

from pairclip_fast.data.stats import LoaderStats, starvation
from pairclip_fast.events import EventLog


def window(**counts: float) -> LoaderStats:
    return LoaderStats(batches=10, samples=2_000, **counts)  # type: ignore[arg-type]


def test_a_fed_training_has_no_verdict() -> None:
    assert starvation(window(wait_s=0.49, fill_s=1.0, fill_cpu_s=1.0), seconds=10.0) is None
    assert starvation(window(), seconds=0.0) is None
    assert starvation(LoaderStats(wait_s=9.0), seconds=10.0) is None


def test_a_starved_training_is_told_for_what_it_waits() -> None:
    busy = starvation(window(wait_s=5.0, fill_s=8.0, fill_cpu_s=16.0), seconds=10.0)
    assert busy is not None
    assert "50%" in busy
    assert "8000 us of CPU time per sample" in busy
    slow = starvation(window(wait_s=5.0, fill_s=8.0, fill_cpu_s=0.8), seconds=10.0)
    assert slow is not None
    assert "idle 90% of its time: slow storage" in slow


def test_windows_are_differences() -> None:
    before = window(wait_s=1.0)
    after = LoaderStats(batches=15, samples=3_000, wait_s=1.5, bad_records=1)
    between = after.since(before)
    assert (between.batches, between.samples, between.wait_s, between.bad_records) == (5, 1_000, 0.5, 1)
    kept = after.copy()
    after.batches += 1
    assert kept.batches == 15


def test_the_loader_counts(backend: str, folders: dict[str, Path], events: EventLog) -> None:
    settings = {"split": "train", "batch_size": 16, "augment": FULL, "seed": 5, "device": CPU}
    loader = make_named_loader(folders["raw"], backend=backend, events=events, **settings)
    for _ in range(3):
        for _ in loader:
            pass
    stats = loader.stats
    loader.close()
    assert (stats.batches, stats.samples, stats.bad_records) == (18, 288, 0)
    assert stats.fill_s > 0.0
    assert 0.0 < stats.fill_cpu_s < 9.0 * stats.fill_s
    assert 0 <= stats.ready <= 2 * stats.batches
    assert stats.bytes_read >= 103 * 6144
