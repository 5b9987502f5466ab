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

import timing
from epoch_records import BENCHMARK, FORMAT, EpochRow, merge
from epoch_tables import EPOCH_PAIRS, Table, claims_table, estimates_table, measured_table, memory_table

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.config import RunConfig, load_preset, overlay, preset_names
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.openmp import spin_briefly
from pairclip_fast.storage import write_atomic
from pairclip_fast.telemetry.machine import usable_cores

BENCH_PAIRS = 8_192
"""Pairs of the generated folder: 32 steps of the largest preset batch, 50 MB."""
REPORT_BATCH = 32
"""Batch size of the report's recommended machines."""
TOTAL_SECONDS = 100.0
"""Aim for all rows together, the preparation included."""
PREPARATION_SECONDS = 25.0
EXIT_INTERRUPTED = 130
BUSY_SHARE = 0.5
"""Load per core from which the machine counts as busy before the benchmark has begun."""
LEAST_ROW_SECONDS, MOST_ROW_SECONDS = 5.0, 20.0
PLOT_SUFFIXES = (".svg", ".png", ".pdf")
DEFAULT_PRESETS = ("baseline", "enhanced", "vit", "fast")


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
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the rates, as svg, png or pdf")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="RECORD", help="measure nothing; show the records of many machines")
    asked = parser.parse_args(words)
    if asked.merge and (asked.json or asked.full or asked.preset or asked.batch_size or asked.device):
        parser.error("--merge measures nothing: of the other options only --markdown and --plot go with it")
    if asked.plot and asked.plot.suffix not in PLOT_SUFFIXES:
        parser.error(f"--plot: expected a file that ends in {', '.join(PLOT_SUFFIXES)}, got {asked.plot.name}")
    return asked


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
        more = ", and what compiling takes" if cuda else ""
        events.say(f"plan: generated images, rows: {len(rows)}, about {each:.0f} s each, {total} in all{more}")
    if not cuda:
        events.say("no CUDA device here: GPU rows are not measured")
    if (load := os.getloadavg()[0]) > BUSY_SHARE * usable_cores():
        events.say(f"the machine is busy (load {load:.1f} on {usable_cores()} cores): the figures will be worse than what it can do")


def measure(rows: list[Row], *, full: bool, done: list[EpochRow], events: EventLog) -> None:
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


def tables(rows: Sequence[EpochRow], *, presets: Sequence[str], missing_gpu: bool) -> list[Table]:
    """All that is printed."""
    return [measured_table(rows, missing_gpu=missing_gpu), memory_table(rows), claims_table(), estimates_table(presets)]


def publish(rows: list[EpochRow], asked: argparse.Namespace, *, missing_gpu: bool) -> None:
    """Print the tables, and write the files that were asked for.

    Raises:
        StorageError: a file cannot be written.
    """
    presets = [name for name in DEFAULT_PRESETS if any(row.preset == name for row in rows)] or list(DEFAULT_PRESETS)
    found = tables(rows, presets=presets, missing_gpu=missing_gpu)
    print("\n\n".join(["", *(table.text() for table in found)]))
    if asked.json:
        records = [dataclasses.asdict(row) for row in rows]
        settings = {"full": asked.full, "epoch_pairs": EPOCH_PAIRS}
        timing.write_record(asked.json, name=BENCHMARK, rows=records, settings=settings, record_format=FORMAT)
    if asked.markdown:
        write_atomic(asked.markdown, ("\n\n".join(table.markdown() for table in found) + "\n").encode())
    if asked.plot:
        from epoch_plot import plot

        plot(rows, asked.plot)


def main(words: Sequence[str] | None = None) -> int:
    """Plan, measure (or read records), print, record; the exit codes are those of `pairclip-fast`."""
    asked, events = arguments(words), EventLog()
    keep_freed_memory()  # as the command line does
    spin_briefly()
    rows: list[EpochRow] = []
    code, cuda = 0, False
    try:
        if asked.merge:
            code, cuda = read_records(asked.merge, rows)
        else:
            cuda = has_cuda()
            plan = plan_rows(asked, cuda=cuda)
            say_plan(plan, full=asked.full, cuda=cuda, events=events)
            measure(plan, full=asked.full, done=rows, events=events)
    except PairclipError as error:
        code = tell(error)
    except KeyboardInterrupt:
        events.say("interrupted; what was finished:")
        code = EXIT_INTERRUPTED
    try:
        if rows:
            publish(rows, asked, missing_gpu=not cuda)
    except PairclipError as error:
        code = tell(error)
    return code


def read_records(paths: Sequence[Path], rows: list[EpochRow]) -> tuple[int, bool]:
    """Add the rows of records of many machines; one that cannot be believed is named and left out.

    Returns:
        The exit code, and whether a GPU is among the machines.
    """
    found, refused = merge(paths)
    rows += found
    code = max((tell(error) for error in refused), default=0)
    return code, any(row.device == "cuda" for row in rows)


def tell(error: PairclipError) -> int:
    """Say what is wrong; its exit code."""
    sys.stderr.write(f"epoch_time.py: {printable(error)}\n")
    return error.exit_code


def has_cuda() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
