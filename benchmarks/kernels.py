"""How fast the caption-bank operations are on this machine's CPU, against torch, faiss and the processor's own limit.

Without arguments: ranks and top-k of 10,000 rows against 10,000 captions of 512 numbers, loss with gradient of 4,096 rows, in
float32 and bfloat16, and how time and memory grow with the bank from 10,000 to a million captions; under three minutes on two
quiet cores. Every variant is held to float64 before it is timed, variants of a job take turns in one process, and all use
the same number of threads. faiss-cpu is asked if it is installed. Rows that we lose stay in.

What bounds what: every job is matrix products plus something done with each score. `of peak` compares with multiply-adds that
wait for nothing. A variant that stores its scores pays for 400 MB of them. Where the processor has no bfloat16 instructions,
bfloat16 is as fast as float32 here and much slower in torch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from kernel_jobs import SCALE, Job, WrongResultError, faiss_index, loss_job, make_problem, rank_job, topk_job
from kernel_plot import draw_curve

from pairclip_fast.allocator import freed_memory_returned, give_back_memory
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


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="kernels.py", description="Speed of the caption-bank operations on a CPU.", allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file, and the plot beside it")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every variant (default: torch's)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times that every variant is timed (default: 5)")
    parser.add_argument("--no-curve", action="store_true", help="leave out the growth with the bank")
    return parser.parse_args(words)


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


def main(words: Sequence[str] | None = None) -> int:
    """Verify, time, print, record."""
    asked = arguments(words)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    chosen = ops.implementation(torch.device("cpu"))
    peak = peak_gflops()
    try:
        with freed_memory_returned():  # from the first table on: a hole once in the heap would be filled, and stay
            tables, faiss_version = jobs()
            weighed = [weigh(job) for job in tables]
    except WrongResultError as error:
        sys.stderr.write(f"kernels.py: {error}\n")
        return 1
    print(f"kernels: {chosen.name} ({chosen.reason}); threads: {torch.get_num_threads()}; faiss: {faiss_version}")
    if peak is not None:
        print(f"peak of float32 multiply-adds: {peak:.0f} GFLOP/s on these threads")
    rows: list[Record] = []
    for job, weights in zip(tables, weighed, strict=True):
        rows += measure(job, weights, repeats=asked.repeats)
    del tables
    growth = [] if asked.no_curve else curve()
    print("\n".join(["", *table(rows, peak=peak), "", *curve_table(growth)]))
    if asked.json:
        settings = {
            "kernels": f"{chosen.name} ({chosen.reason})",
            "captions": CAPTIONS,
            "dim": DIM,
            "faiss": faiss_version,
            "peak_gflops": peak,
            "curve": growth,
        }
        timing.write_record(asked.json, name="kernels", rows=rows, settings=settings)
        if growth:
            draw_curve(growth, asked.json.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
