"""Timing that the benchmarks share: interleaved repetitions, medians with spread, and a record of the machine.

Shared and virtual machines drift by tens of per cent within minutes. So variants take turns (A B B A ...) instead of
running one after the other, CPU time is kept beside wall time, the middle and the spread are reported instead of the
best, and every record says where and with which versions it was made. Nothing here imports torch by itself.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pairclip_fast.storage import write_json
from pairclip_fast.telemetry.machine import cpu_model, git_commit, package_versions, usable_cores
from pairclip_fast.telemetry.memory import GIB, host_reading

RECORD_FORMAT = 1
"""Version of the JSON layout that `write_record` writes; a benchmark whose rows have a layout of their own counts its own."""
PACKAGES = ("pairclip-fast", "torch", "torchvision", "numpy", "nvidia-dali-cuda130", "webdataset", "triton")
"""Packages whose versions decide how fast things are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One repetition: seconds on the clock, and seconds of CPU over all threads of the process (user and system)."""

    wall_s: float
    cpu_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def iqr(self) -> float:
        """Width of the middle half."""
        return self.high - self.low


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles (inclusive method: a single value is its own quartiles).

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no measurements")
    if len(ordered) == 1:
        return Spread(ordered[0], ordered[0], ordered[0], 1)
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high, len(ordered))


def measure(call: Callable[[], object], *, synchronize: Callable[[], object] | None = None) -> Measurement:
    """Time one call.

    Args:
        call: What is timed.
        synchronize: Waits for the device; called before the clock starts and before it stops. Device work is
            asynchronous: without it only the time to enqueue would be measured.
    """
    if synchronize is not None:
        synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if synchronize is not None:
        synchronize()
    return Measurement(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)


def interleave(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, synchronize: Callable[[], object] | None = None
) -> dict[str, list[Measurement]]:
    """Time every variant `repeats` times, taking turns, there and back: A B C C B A A B C ...

    A slow minute of the machine then hits all variants alike, and none always comes after one that leaves caches and memory in
    a bad state for it: the ratio of their medians stays fair.
    """
    rows: dict[str, list[Measurement]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
            rows[name].append(measure(variants[name], synchronize=synchronize))
    return rows


def peak_rss_gib() -> float:
    """Peak resident memory of this process since the start, or since `reset_host_peak` where that worked."""
    peak = host_reading().peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if peak is None else peak / GIB


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, threads, versions, commit, load. Torch is asked only if loaded."""
    record: dict[str, Any] = {
        "cpu": cpu_model(),
        "cpus_usable": usable_cores(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
        "commit": git_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        cuda = torch.cuda.is_available()
        record["threads"] = torch.get_num_threads()
        record["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        record["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return record


def write_record(
    path: Path, *, name: str, rows: list[dict[str, Any]], settings: Mapping[str, Any], record_format: int = RECORD_FORMAT
) -> None:
    """Write a benchmark's rows with the environment, as JSON that later tools can merge (the rows say all they need).

    Args:
        path: Where to; its folder is made and an older record replaced.
        name: The benchmark.
        rows: One flat dictionary per measured configuration.
        settings: What the benchmark was asked to do.
        record_format: Version of the layout.

    Raises:
        StorageError: the record cannot be written.
    """
    record = {"format": record_format, "benchmark": name, "settings": dict(settings), "environment": environment(), "rows": rows}
    write_json(path, record)
