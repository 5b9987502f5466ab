"""What a training step costs while other programs want the same cores: ours, and plain torch under autocast.

As many busy programs as there are threads take the cores in turns with nobody: a few steps with them, a few without. The
scheduler gives a step half of the cores then, so twice the time is fair. What is far more is time lost at barriers: threads
that spin while they wait for another, which cannot work because they spin. Run it with OMP_WAIT_POLICY=ACTIVE in the
environment to see that, and without to see what the programs of this project choose.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timing
from train_step import configuration, table

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.config import preset_names
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.openmp import CHOICES, spin_briefly

DATA_PAIRS = 1_024
BUSY = "while True: pass"
FAIR = 2.0
"""Times as long, with as many busy programs as threads."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="competition.py", description="A training step beside busy programs.", allow_abbrev=False)
    parser.add_argument("--preset", choices=preset_names(), default="vit", metavar="NAME", help="this preset (default: vit)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of the step (default: the preset's)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="steps of each kind (default: 9)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows, with the environment, to this file")
    return parser.parse_args(words)


class BusyPrograms:
    """Programs that compute for ever, held still except where they are let loose."""

    def __init__(self, count: int) -> None:
        self._programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        self._tell(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """They compute inside."""
        self._tell(signal.SIGCONT)
        try:
            yield
        finally:
            self._tell(signal.SIGSTOP)

    def close(self) -> None:
        """End them; a stopped program can be killed too."""
        for program in self._programs:
            program.kill()
            program.wait()

    def _tell(self, what: signal.Signals) -> None:
        for program in self._programs:
            program.send_signal(what)


def measure(step: Any, batch: Any, *, programs: BusyPrograms, repeats: int) -> dict[str, Any]:
    """One row: a step alone and beside the programs, in turns."""
    alone, beside = [], []
    step.step(batch)
    for _ in range(repeats):
        alone.append(timing.measure(lambda: step.step(batch)))
        with programs.running():
            beside.append(timing.measure(lambda: step.step(batch)))
    row: dict[str, Any] = {"variant": step.name, "precision": step.precision, "batch_size": step.batch_size, "repeats": repeats}
    for name, taken in (("alone", alone), ("beside", beside)):
        wall = timing.spread(one.wall_s for one in taken)
        cpu = timing.spread(one.cpu_s for one in taken)
        row |= {
            f"{name}_wall_s": wall.median,
            f"{name}_wall_s_low": wall.low,
            f"{name}_wall_s_high": wall.high,
            f"{name}_cpu_s": cpu.median,
        }
    return row | {"times_as_long": row["beside_wall_s"] / row["alone_wall_s"]}


def words(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All that is printed."""
    cells = [("variant", "precision", "alone s", "CPU s", "beside busy programs s", "CPU s", "times as long")]
    cells += [
        (
            row["variant"],
            row["precision"],
            f"{row['alone_wall_s']:.3f} [{row['alone_wall_s_low']:.3f}, {row['alone_wall_s_high']:.3f}]",
            f"{row['alone_cpu_s']:.3f}",
            f"{row['beside_wall_s']:.3f} [{row['beside_wall_s_low']:.3f}, {row['beside_wall_s_high']:.3f}]",
            f"{row['beside_cpu_s']:.3f}",
            f"{row['times_as_long']:.2f} (fair: {FAIR:.0f})",
        )
        for row in rows
    ]
    return table(cells)


def main(words_given: Sequence[str] | None = None) -> int:
    """Verify, time, print, record; the exit codes are those of `pairclip-fast`."""
    asked, events = arguments(words_given), EventLog()
    keep_freed_memory()  # as the command line does
    spin_briefly()
    import torch
    from step_variants import OurStep, Step, plain_steps, verify
    from training_rows import Bench

    from pairclip_fast.train.setup import build_trainee, train_loader

    threads = torch.get_num_threads()
    waiting = {name: os.environ[name] for name in CHOICES if name in os.environ}
    events.say(f"threads: {threads}, as many busy programs; waiting: {waiting}")
    try:
        config = configuration(asked.preset, batch_size=asked.batch_size, amp=True)
        with tempfile.TemporaryDirectory(prefix="pairclip-competition-") as folder, contextlib.closing(BusyPrograms(threads)) as programs:
            parts = Bench(Path(folder) / "data", pairs=DATA_PAIRS, epoch_pairs=DATA_PAIRS, events=events).parts(config)
            ours = OurStep(build_trainee(parts), parts)
            with contextlib.closing(train_loader(parts, events=events)) as loader:
                batch = next(iter(loader))
            steps: list[Step] = [ours, plain_steps(ours)[-1]]
            for step in steps:
                verify(step, batch)
            rows = [measure(step, batch, programs=programs, repeats=asked.repeats) for step in steps]
    except PairclipError as error:
        sys.stderr.write(f"competition.py: {printable(error)}\n")
        return error.exit_code
    print("\n".join(words(rows)))
    if asked.json:
        settings = {"preset": asked.preset, "repeats": asked.repeats, "threads": threads, "waiting": waiting}
        timing.write_record(asked.json, name="competition", rows=rows, settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
