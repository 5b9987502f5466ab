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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing

from pairclip_fast.allocator import freed_memory_returned
from pairclip_fast.openmp import spin_briefly


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="kernels.py", description="Speed of the caption-bank operations on a CPU.", allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file, and the plot beside it")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every variant (default: torch's)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times that every variant is timed (default: 5)")
    parser.add_argument("--no-curve", action="store_true", help="leave out the growth with the bank")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Verify, time, print, record."""
    asked = arguments(words)
    spin_briefly()
    import torch
    from kernel_jobs import WrongResultError
    from kernel_plot import draw_curve
    from kernel_rows import CAPTIONS, DIM, curve, curve_table, jobs, measure, peak_gflops, table, weigh

    from pairclip_fast.kernels import ops

    if asked.threads:
        torch.set_num_threads(asked.threads)
    chosen = ops.implementation(torch.device("cpu"), dtype=torch.float32, dim=DIM)
    peaks = [peak_gflops()]
    try:
        with freed_memory_returned():  # from the first table on: a hole once in the heap would be filled, and stay
            tables, faiss_version = jobs()
            weighed = [weigh(job) for job in tables]
    except WrongResultError as error:
        sys.stderr.write(f"kernels.py: {error}\n")
        return 1
    print(f"kernels: {chosen.name} ({chosen.reason}); threads: {torch.get_num_threads()}; faiss: {faiss_version}")
    rows: list[dict[str, Any]] = []
    for job, weights in zip(tables, weighed, strict=True):
        rows += measure(job, weights, repeats=asked.repeats)
        peaks.append(peak_gflops())  # the neighbours of a shared machine come and go
    del tables
    growth = [] if asked.no_curve else curve()
    peak = max((one for one in peaks if one is not None), default=None)
    if peak is not None:
        print(f"peak of float32 multiply-adds: {peak:.0f} GFLOP/s on these threads")
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
