"""How long a training step takes on this machine's CPU, against plain torch and against its own matrix products.

Each preset's step is run as the report this project grew from does it, in plain torch (float32, and under bfloat16 autocast), and
by our trainer. All are held to float64 first, then take turns in one process on batches that already lie in memory. The
step's matrix products and convolutions are then timed one by one: added up they are the GEMM bound, what a step would take
if nothing else cost anything. Last, a profile of our step says where the rest goes.

Of the bound is pairs per second over those of the bound at our batch size and precision. Variants of different batch size
do different amounts of work per step; their rates compare, their seconds do not. Without bfloat16 instructions autocast is
much slower than float32; a variant that takes longer than a few seconds is timed once.
"""

from __future__ import annotations

import argparse
import contextlib
import operator
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.config import RunConfig, load_preset, overlay, preset_names
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.openmp import spin_briefly

DEFAULT_PRESETS = ("enhanced", "vit", "fast")
DATA_PAIRS = 1_024
SLOW_SECONDS = 6.0
"""A step that takes longer is timed once."""
TOP_OPERATORS = 10
SILENT = "5"
"""A level of the profiler's log above all of its messages."""
Record = dict[str, Any]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="train_step.py", description="Time of a training step on a CPU.", allow_abbrev=False)
    parser.add_argument("--preset", nargs="+", choices=preset_names(), default=DEFAULT_PRESETS, metavar="NAME", help="these presets")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of ours and plain torch (default: the preset's)")
    parser.add_argument("--no-amp", dest="amp", action="store_false", help="ours in float32, as `train` runs it without --amp")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times that every variant is timed (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every variant (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows, with the environment, to this file")
    return parser.parse_args(words)


def configuration(preset: str, *, batch_size: int | None, amp: bool) -> RunConfig:
    """The preset as `train --device cpu` runs it, with or without `--amp`."""
    train: Record = {"device": "cpu", "amp": amp} | ({"batch_size": batch_size} if batch_size else {})
    return overlay(load_preset(preset), {"train": train}, where="benchmark")


def time_steps(steps: Sequence[Any], batches: dict[str, Any], *, repeats: int) -> dict[str, list[timing.Measurement]]:
    """Warm every variant up, then let them take turns; the slow ones once."""
    calls = {one.name: (lambda one=one: one.step(batches[one.name])) for one in steps}
    warm = {name: timing.measure(call).wall_s for name, call in calls.items()}
    quick = {name: call for name, call in calls.items() if warm[name] < SLOW_SECONDS}
    slow = {name: call for name, call in calls.items() if name not in quick}
    return timing.interleave(quick, repeats=repeats) | timing.interleave(slow, repeats=1)


def profile(step: Any, batch: Any) -> list[Record]:
    """The operators of one step that take most time of their own."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step.step(batch)
    averages = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in averages)
    return [
        {"operator": one.key, "calls": one.count, "ms": one.self_cpu_time_total / 1e3, "share": one.self_cpu_time_total / total}
        for one in averages[:TOP_OPERATORS]
    ]


def measure(bench: Any, config: RunConfig, *, repeats: int, events: EventLog) -> tuple[list[Record], Record]:
    """Rows of one preset, and what explains them: text tower, errors, products, profile."""
    from step_products import products, rates
    from step_variants import OurStep, Step, plain_steps, report_steps, verify

    from pairclip_fast.telemetry.flops import training_flops_per_pair
    from pairclip_fast.train.setup import build_trainee, train_loader

    parts = bench.parts(config)
    ours = OurStep(build_trainee(parts), parts)
    with contextlib.closing(train_loader(parts, events=events)) as loader:
        batch = next(iter(loader))
    reports, text = report_steps(parts, events=events)
    steps: list[Step] = [*reports, *plain_steps(ours), ours]
    batches = {one.name: batch.map(operator.itemgetter(slice(one.batch_size))) for one in steps}
    errors = {one.name: verify(one, batch) for one in steps}
    times = time_steps(steps, batches, repeats=repeats)
    found = rates(products(ours.encoder, images=tuple(batch.images.shape), captions=parts.loss_captions), dtype=parts.precision.dtype)
    bound = ours.batch_size / sum(row["seconds"] for row in found)
    flop = training_flops_per_pair(ours.encoder, image_shape=parts.image_shape, num_captions=parts.loss_captions)
    rows = []
    for one in steps:
        wall = timing.spread(taken.wall_s for taken in times[one.name])
        rate = len(batches[one.name].caption_ids) / wall.median
        rows.append(
            {
                "preset": config.preset,
                "variant": one.name,
                "precision": one.precision,
                "batch_size": len(batches[one.name].caption_ids),
                "repeats": wall.repeats,
                "wall_s": wall.median,
                "wall_s_low": wall.low,
                "wall_s_high": wall.high,
                "cpu_s": statistics.median(taken.cpu_s for taken in times[one.name]),
                "pairs_per_second": rate,
                "tflops": rate * flop / 1e12,
                "of_bound": rate / bound,
                "loss_error": errors[one.name][0],
                "gradient_error": errors[one.name][1],
            }
        )
    for row in rows:
        row["ours_faster_by"] = rows[-1]["pairs_per_second"] / row["pairs_per_second"]
    explained = {"text_tower": text, "bound_pairs_per_second": bound, "products": found, "profile": profile(ours, batches["ours"])}
    return rows, explained


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def words(rows: list[Record], explained: Record) -> list[str]:
    """All that is printed of one preset."""
    steps = [("variant", "precision", "batch", "s a step", "CPU s", "pairs/s", "TFLOP/s", "of bound", "ours is faster by")]
    steps += [
        (
            row["variant"],
            row["precision"],
            str(row["batch_size"]),
            f"{row['wall_s']:.3f} [{row['wall_s_low']:.3f}, {row['wall_s_high']:.3f}]",
            f"{row['cpu_s']:.3f}",
            f"{row['pairs_per_second']:.1f}",
            f"{row['tflops']:.3f}",
            f"{row['of_bound']:.0%}",
            f"{row['ours_faster_by']:.2f}x",
        )
        for row in rows
    ]
    products = [("shapes", "kind", "times", "GFLOP", "ms", "GFLOP/s")]
    products += [
        (row["shapes"], row["kind"], str(row["count"]), f"{row['gflop']:.2f}", f"{row['seconds'] * 1e3:.1f}", f"{row['gflops']:.0f}")
        for row in explained["products"]
    ]
    operators = [("operator", "calls", "ms", "share")]
    operators += [(row["operator"], str(row["calls"]), f"{row['ms']:.1f}", f"{row['share']:.0%}") for row in explained["profile"]]
    bound = f"GEMM bound: {explained['bound_pairs_per_second']:.1f} pairs/s, from these:"
    head = ["", f"preset {rows[0]['preset']} (text tower of the report: {explained['text_tower']})"]
    return [*head, *table(steps), "", bound, *table(products), "", "our step by operator:", *table(operators)]


def main(words_given: Sequence[str] | None = None) -> int:
    """Verify, time, print, record; the exit codes are those of `pairclip-fast`."""
    asked, events = arguments(words_given), EventLog()
    keep_freed_memory()  # as the command line does
    spin_briefly()
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)  # read when torch's profiler is loaded
    import torch
    from training_rows import Bench

    if asked.threads:
        torch.set_num_threads(asked.threads)
    rows: list[Record] = []
    explained: Record = {}
    try:
        configs = [configuration(preset, batch_size=asked.batch_size, amp=asked.amp) for preset in asked.preset]
        with tempfile.TemporaryDirectory(prefix="pairclip-train-step-") as folder:
            bench = Bench(Path(folder) / "data", pairs=DATA_PAIRS, epoch_pairs=DATA_PAIRS, events=events)
            for config in configs:
                found, explained[config.preset] = measure(bench, config, repeats=asked.repeats, events=events)
                rows += found
                print("\n".join(words(found, explained[config.preset])), flush=True)
        if asked.json:
            timing.write_record(asked.json, name="train_step", rows=rows, settings={"repeats": asked.repeats, "explained": explained})
    except PairclipError as error:
        sys.stderr.write(f"train_step.py: {printable(error)}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
