"""The rows of the kernel benchmark: every variant is held to float64, weighed, and timed in turns with the others."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import timing
import torch
from kernel_jobs import SCALE, Job, WrongResultError, faiss_index, loss_job, make_problem, rank_job, topk_job

from pairclip_fast.allocator import give_back_memory
from pairclip_fast.kernels import ops
from pairclip_fast.native import native
from pairclip_fast.telemetry.memory import reset_host_peak

ROWS, CAPTIONS, DIM, LOSS_ROWS = 10_000, 10_000, 512, 4_096
CURVE_ROWS = 128
CURVE_CAPTIONS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SLOW_SECONDS = 5.0
"""A variant that takes longer is timed once."""
PEAK_ROUNDS = 4_000_000
OURS = ("ours float32", "ours bfloat16")
COLUMNS = ("job", "variant", "seconds", "CPU s", "GFLOP/s", "of peak", "extra MiB", "ours float32 is faster by", "bfloat16")

Record = dict[str, Any]


class Weighed(NamedTuple):
    """A variant that gave the right answer, before it is timed."""

    slow: bool
    extra_mib: float | None
    """Peak memory of a call beyond what there was before; None for slow variants, and where the system does not say."""


def peak_gflops() -> float | None:
    """Multiply-adds that wait for nothing, on all threads; the best of three. None without the C++ extension."""
    module = native().module
    if module is None:
        return None
    name, threads, best = module.kernels.engines()[-1], torch.get_num_threads(), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            flop = sum(pool.map(lambda _: float(module.kernels.multiply_adds(name, PEAK_ROUNDS)), range(threads)))
            best = max(best, flop / (time.perf_counter() - started) / 1e9)
    return best


def extra_memory(call: Any) -> float | None:
    """Peak memory of a call beyond what there was before, results included, in MiB."""
    gc.collect()
    give_back_memory()
    if not reset_host_peak():
        return None
    before = timing.peak_rss_gib()
    call()
    return (timing.peak_rss_gib() - before) * 1024


def weigh(job: Job) -> dict[str, Weighed]:
    """Verify every variant and weigh it, but for the slow ones."""
    weighed = {}
    for name, variant in job.variants.items():
        started = time.perf_counter()
        if not variant.right(variant.call()):
            raise WrongResultError(f"{job.name}, {name}: not the answer of float64")
        slow = time.perf_counter() - started >= SLOW_SECONDS
        weighed[name] = Weighed(slow=slow, extra_mib=None if slow else extra_memory(variant.call))
    return weighed


def measure(job: Job, weighed: dict[str, Weighed], *, repeats: int) -> list[Record]:
    """Time the variants in turns; the slow ones once."""
    calls = {name: variant.call for name, variant in job.variants.items()}
    slow = [name for name in calls if weighed[name].slow]
    times = timing.interleave({name: call for name, call in calls.items() if name not in slow}, repeats=repeats)
    times |= timing.interleave({name: calls[name] for name in slow}, repeats=1)
    walls = {name: timing.spread(one.wall_s for one in times[name]) for name in calls}
    return [
        {
            "job": job.name,
            "variant": name,
            "rows": job.rows,
            "wall_s": walls[name].median,
            "wall_s_low": walls[name].low,
            "wall_s_high": walls[name].high,
            "cpu_s": statistics.median(one.cpu_s for one in times[name]),
            "repeats": walls[name].repeats,
            "gflops": 2e-9 * job.products * job.rows * CAPTIONS * DIM / walls[name].median,
            "extra_mib": weighed[name].extra_mib,
        }
        | {f"{ours}_faster_by": walls[name].median / walls[ours].median for ours in OURS}
        for name in calls
    ]


def jobs() -> tuple[list[Job], str]:
    """All tables, and which faiss takes part."""
    both = [make_problem(ROWS, CAPTIONS, DIM, dtype) for dtype in (torch.float32, torch.bfloat16)]
    index, version = faiss_index(both[0].bank)
    loss = loss_job([make_problem(LOSS_ROWS, CAPTIONS, DIM, dtype) for dtype in (torch.float32, torch.bfloat16)])
    return [rank_job(both, index), *(topk_job(both, index, k) for k in (10, 100)), loss], version


def curve() -> list[Record]:
    """Time and memory of our operations as the bank grows; one bank, of which ever more is used."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.empty(max(CURVE_CAPTIONS), DIM, dtype=torch.bfloat16)
    for start in range(0, len(bank), CAPTIONS):
        part = torch.randn(CAPTIONS, DIM, generator=generator)
        bank[start : start + CAPTIONS] = torch.nn.functional.normalize(part, dim=1)
    emb, targets, scale = bank[:CURVE_ROWS].clone(), torch.arange(CURVE_ROWS), torch.tensor(SCALE)
    rows = []
    for captions in CURVE_CAPTIONS:
        used = bank[:captions]
        calls = {
            "ranks": lambda used=used: ops.bank_stats(emb, used, scale, targets),
            "top 100": lambda used=used: ops.bank_topk(emb, used, k=100),
            "softmax": lambda used=used: ops.bank_softmax(emb, used, scale),
        }
        for name, call in calls.items():
            memory = extra_memory(call)
            wall = timing.spread(timing.measure(call).wall_s for _ in range(3))
            rows.append({"job": name, "captions": captions, "rows": CURVE_ROWS, "wall_s": wall.median, "extra_mib": memory})
    return rows


def table(rows: list[Record], *, peak: float | None) -> list[str]:
    """The rows as aligned text."""
    cells: list[Sequence[str]] = [COLUMNS]
    cells += [
        (
            row["job"],
            row["variant"],
            f"{row['wall_s']:.3f} [{row['wall_s_low']:.3f}, {row['wall_s_high']:.3f}]",
            f"{row['cpu_s']:.3f}",
            f"{row['gflops']:.0f}",
            "" if peak is None else f"{row['gflops'] / peak:.0%}",
            "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}",
            *("" if row["variant"] in OURS else f"{row[f'{ours}_faster_by']:.2f}x" for ours in OURS),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def curve_table(rows: list[Record]) -> list[str]:
    """The growth with the bank as text."""
    return [
        f"{row['job']:8} of {row['rows']} rows, {row['captions']:>9,} captions: {row['wall_s']:.3f} s, "
        f"{1e9 * row['wall_s'] / row['rows'] / row['captions']:.2f} ns a pair"
        + ("" if row["extra_mib"] is None else f", {row['extra_mib']:.0f} MiB extra")
        for row in rows
    ]
