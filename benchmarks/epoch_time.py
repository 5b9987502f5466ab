"""How long an epoch of 50,000 pairs takes on this machine: each preset, on each device, through the real loader.

Without arguments this takes about two minutes on two cores, needs no data (it draws its own small folder of shapes) and no
network. Each row is verified before it is timed: the loss of a batch, as the trainer computes it, must equal the loss of a
float64 copy of the model against the definition in `reference_loss`. Then the trainer's own epoch loop runs on the
trainer's own loader; after a warm-up, several stretches of steps are timed and their median and quartiles given.
The time per epoch is extrapolated from those steps unless --full asks for whole epochs. Evaluation, checkpoints and the
start of the program are not in it. The rows of the report this project grew from stand beside ours as what they are: claims.

What is slow where: at small batches on a CPU the optimizer and the Python around it weigh most, at the presets' own batch
sizes the matrix products do. A data-wait share near zero means that the loader keeps up, not that it costs nothing: on a
CPU it takes its cycles from the same cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.config import RunConfig, load_preset, overlay, preset_names
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.machine import usable_cores

EPOCH_PAIRS = 50_000
"""Pairs of an epoch: one per CIFAR-100 training image, as in the report."""
BENCH_PAIRS = 8_192
"""Pairs of the generated folder: 32 steps of the largest preset batch, 50 MB."""
REPORT_BATCH = 32
"""Batch size of the report's recommended machines."""
REPORT_CLAIMS = (("RTX 3080", 32, 3), ("RTX 2080", 32, 5), ("GTX 1060", 16, 8), ("CPU", 8, 45))
"""Device, batch size and minutes per epoch of `enhanced`, from the report's section 3.2. Nobody has checked them."""
TOTAL_SECONDS = 110.0
"""Aim for all rows together, the preparation included."""
PREPARATION_SECONDS = 25.0
EXIT_INTERRUPTED = 130
BUSY_SHARE = 0.5
"""Load per core from which the machine counts as busy before the benchmark has begun."""
LEAST_ROW_SECONDS, MOST_ROW_SECONDS = 5.0, 20.0
DEFAULT_PRESETS = ("baseline", "enhanced", "vit", "fast")
COLUMNS = ("device", "preset", "batch", "format", "minutes per epoch", "pairs/s", "TFLOP/s", "of peak", "data wait", "peak GiB")


Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration to measure."""

    device: str
    preset: str
    batch_size: int

    def config(self) -> RunConfig:
        """The preset as `train --amp` runs it, on this device with this batch size."""
        train = {"device": self.device, "batch_size": self.batch_size, "amp": True}
        return overlay(load_preset(self.preset), {"train": train}, where="benchmark")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="epoch_time.py", description="Time of an epoch of 50,000 pairs on this machine, for each preset.", allow_abbrev=False
    )
    parser.add_argument("--preset", nargs="+", choices=preset_names(), metavar="NAME", help="only these presets (default: all)")
    parser.add_argument("--batch-size", nargs="+", type=int, metavar="N", help="these batch sizes (default: the preset's own, and 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this device (default: all there are)")
    parser.add_argument("--full", action="store_true", help="measure a whole epoch per row instead of extrapolating from steps")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows, with the environment, to this file")
    return parser.parse_args(words)


def plan_rows(asked: argparse.Namespace, *, cuda: bool) -> list[Row]:
    """The configurations to measure: every device, preset and batch size asked for, each once."""
    rows: list[Row] = []
    for device in [asked.device] if asked.device else ["cpu", "cuda"] if cuda else ["cpu"]:
        for preset in asked.preset or DEFAULT_PRESETS:
            sizes = asked.batch_size or (load_preset(preset).train.batch_size, REPORT_BATCH)
            rows += [Row(device=device, preset=preset, batch_size=size) for size in dict.fromkeys(sizes)]
    for row in rows:
        row.config()  # a bad batch size is named before anything is drawn
    return rows


def row_seconds(*, left_s: float, rows: int) -> float:
    """Seconds that each of so many rows may take."""
    return min(max(left_s / max(rows, 1), LEAST_ROW_SECONDS), MOST_ROW_SECONDS)


def say_plan(rows: list[Row], *, full: bool, cuda: bool, events: EventLog) -> None:
    """What will be done and how long it will take, before it is done."""
    from pairclip_fast.telemetry.timing import words_for_seconds

    if full:
        events.say(f"plan: whole epochs of {EPOCH_PAIRS:,} pairs, rows: {len(rows)}; on a CPU this can take hours")
    else:
        each = row_seconds(left_s=TOTAL_SECONDS - PREPARATION_SECONDS, rows=len(rows))
        total = words_for_seconds(PREPARATION_SECONDS + len(rows) * each)
        events.say(f"plan: generated images, rows: {len(rows)}, about {each:.0f} s each, {total} in all")
    if not cuda:
        events.say("no CUDA device here: GPU rows are not measured")
    if (load := os.getloadavg()[0]) > BUSY_SHARE * usable_cores():
        events.say(f"the machine is busy (load {load:.1f} on {usable_cores()} cores): the figures will be worse than what it can do")


def measure(rows: list[Row], *, full: bool, done: list[Record], events: EventLog) -> None:
    """Measure the rows one after the other, adding each to `done` as it is finished; a slow start shortens the rows."""
    from training_rows import Bench

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pairclip-epoch-time-") as folder:
        bench = Bench(Path(folder) / "data", pairs=EPOCH_PAIRS if full else BENCH_PAIRS, epoch_pairs=EPOCH_PAIRS, events=events)
        for number, row in enumerate(rows, start=1):
            events.say(f"{number} of {len(rows)}: {row.preset}, batch {row.batch_size}, on {row.device}")
            left_s = TOTAL_SECONDS - (time.monotonic() - started)
            budget_s = None if full else row_seconds(left_s=left_s, rows=len(rows) - len(done))
            done.append(bench.measure(row.config(), budget_s=budget_s))


def table(rows: list[Record], *, cuda: bool) -> list[str]:
    """The measured rows, the devices nobody measured, and the report's claims, as aligned text."""
    cells: list[Sequence[str]] = [COLUMNS]
    for row in rows:
        low, middle, high = (row[key] / 60 for key in ("epoch_s_low", "epoch_s", "epoch_s_high"))
        memory = f"{row['peak_rss_gib']:.2f}" + ("" if row["cuda_peak_gib"] is None else f" + {row['cuda_peak_gib']:.2f} GPU")
        cells.append(
            (
                row["device"],
                row["preset"],
                str(row["batch_size"]),
                row["precision"],
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['pairs_per_second']:,.0f}",
                f"{row['tflops']:.3g}",
                f"{row['tflops'] / peak(row, rows):.0%}",
                f"{row['data_wait_fraction']:.1%}",
                memory,
            )
        )
    if not cuda:
        cells.append(("cuda", "all", "", "", "not measured"))
    for device, batch_size, minutes in REPORT_CLAIMS:
        cells.append((device, "enhanced", str(batch_size), "", f"~{minutes} (claim)"))
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in cells]


def peak(row: Record, rows: list[Record]) -> float:
    """The best TFLOP/s of a large matrix product seen with this row's device and format; one look alone may meet a busy moment."""
    kind = (row["device"], row["precision"])
    return max(float(other["peak_tflops"]) for other in rows if (other["device"], other["precision"]) == kind)


def footnotes(rows: list[Record]) -> list[str]:
    """What the figures are and what they are not."""
    whole = rows and not any(row["extrapolated"] for row in rows)
    how = "of whole epochs" if whole else "extrapolated from steady-state steps (--full measures whole epochs)"
    return [
        f"minutes per epoch of {EPOCH_PAIRS:,} pairs: median [quartiles], training only, {how}",
        "format: what --amp chose; of peak: of a large matrix product in that format, measured here; peak GiB: of the whole process",
        "claim: from the report this project grew from; nobody has checked it, and its epoch runs the text encoder too",
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Plan, measure, print, record; the exit codes are those of `pairclip-fast`."""
    asked, events = arguments(words), EventLog()
    keep_freed_memory()  # as the command line does
    done: list[Record] = []
    code = 0
    try:
        cuda = has_cuda()
        rows = plan_rows(asked, cuda=cuda)
        say_plan(rows, full=asked.full, cuda=cuda, events=events)
        measure(rows, full=asked.full, done=done, events=events)
    except PairclipError as error:
        sys.stderr.write(f"epoch_time.py: {printable(error)}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        events.say("interrupted; what was finished:")
        code = EXIT_INTERRUPTED
    if done:
        print("\n".join(["", *table(done, cuda=cuda), "", *footnotes(done)]))
        if asked.json:
            timing.write_record(asked.json, name="epoch_time", rows=done, settings={"full": asked.full, "epoch_pairs": EPOCH_PAIRS})
    return code


def has_cuda() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
