"""How fast loaders feed: ours in every form, and what others would use, on the same pairs, side by side.

Without arguments this takes a few minutes on two cores and draws its own 8,192 pairs. Every row is checked before it is timed;
then all rows of a rung take turns, several times, each reading every value of what it is given. Three rungs that are never
mixed: `read` (decoded bytes), `normalise` (float32, planes), `full` (rotation, colours, flip, normalisation per tile).
`us/pair` is CPU time over all threads and worker processes of a row: the figure that a busy machine disturbs least, and the
one that decides what a loader costs where training needs the same cores. Reading a batch costs the same whoever made it; the
first row is that alone, and `less reading` is what is left for the loader. `s/epoch` is an epoch of 50,000 pairs on the clock, while
one more thread reads every batch; `unread` the same where the batches are only handed over. The page cache is warm.

Peers that need a format of their own run in another environment: `--peers PYTHON` names its interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import timing

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.machine import usable_cores

EPOCH_PAIRS = 50_000
BENCH_PAIRS = 8_192
SHARDS = 4
ENCODINGS = ("raw", "png", "jpeg")
WARM_UP_BATCHES = 4
"""Before each turn: what was prefetched while others had their turn does not count."""
TURN_SECONDS = 0.4
SETTLE_SECONDS, SETTLE_STEP = 30.0, 0.05
COLUMNS = (
    "rung",
    "loader",
    "records",
    "threads",
    "pairs/s",
    "us/pair",
    "less reading",
    "times ours",
    "s/epoch",
    "unread",
    "first ms",
    "resume ms",
    "state B",
    "pictures",
)
Record = dict[str, Any]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    what = "Loaders side by side on the same pairs, on the CPU (DALI too)."
    parser = argparse.ArgumentParser(prog="loader.py", description=what, allow_abbrev=False)
    parser.add_argument("--path", type=Path, metavar="FILE", help="source images as for `shard --path` (default: generated shapes)")
    parser.add_argument("--pairs", type=int, default=BENCH_PAIRS, metavar="N", help=f"training pairs (default: {BENCH_PAIRS})")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="pairs per batch (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each row (default: 5)")
    parser.add_argument("--rung", nargs="+", choices=("read", "normalise", "full"), default=["read", "normalise", "full"], metavar="RUNG")
    parser.add_argument("--ours-only", action="store_true", help="without peers")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="interpreter of an environment with further loaders")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows, with the environment, to this file")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the CPU time per pair (PNG or SVG)")
    return parser.parse_args(words)


class Again:
    """The samples of a split once more, to be written in another encoding."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def tiles(self, index: int) -> Any:
        return self._reader.tiles(index)

    def facts(self, index: int) -> dict[str, Any]:
        return dict(json.loads(bytes(self._reader.member(index, "json"))))

    def caption(self, index: int) -> str:
        return bytes(self._reader.member(index, "txt")).decode()


def make_folders(root: Path, *, path: Path | None, pairs: int, events: EventLog) -> dict[str, Path]:
    """The same pairs as raw, PNG and JPEG records."""
    from pairclip_fast.data.commands import run_shard
    from pairclip_fast.data.manifest import write_manifest
    from pairclip_fast.data.options import ShardOptions
    from pairclip_fast.data.shards import ShardReader
    from pairclip_fast.data.writer import ShardFormat, write_split
    from pairclip_fast.storage import REAL

    folders = {encoding: root / encoding for encoding in ENCODINGS}
    size = -(-pairs // SHARDS)
    run_shard(ShardOptions(source="auto" if path else "shapes", path=path, out=folders["raw"], num_pairs=pairs, shard_size=size), events)
    with ShardReader(folders["raw"], "train") as reader:
        for encoding in ("png", "jpeg"):
            shard_format = ShardFormat(encoding=encoding, shard_size=size)
            shards = write_split(folders[encoding] / "train", Again(reader), shard_format, fs=REAL, advance=lambda _count: None)
            split = dataclasses.replace(reader.manifest.splits["train"], shards=shards)
            write_manifest(folders[encoding], dataclasses.replace(reader.manifest, encoding=encoding, splits={"train": split}))
    return folders


def open_streams(asked: argparse.Namespace, folders: dict[str, Path], rung: str, *, events: EventLog) -> list[Any]:
    """All rows of a rung, opened and checked."""
    from loader_peers import peer_streams
    from loader_rows import our_stream, our_variants, ready_stream

    cores, streams = usable_cores(), [ready_stream(rung=rung, batch_size=asked.batch_size)]
    variants = our_variants(cores=cores) if rung != "read" else []
    for ours in variants:
        plain = ours.backend != "native" or (ours.isa == variants[0].isa and ours.threads == 2 and "bf16" not in ours.name)
        for encoding in ENCODINGS if plain and rung == "full" else ENCODINGS[:1]:
            settings = {"encoding": encoding, "rung": rung, "batch_size": asked.batch_size}
            streams.append(our_stream(ours, folders[encoding], **settings, events=events))
    if not asked.ours_only:
        streams += list(peer_streams(folders, rung=rung, threads=min(2, cores), batch_size=asked.batch_size, events=events))
    return streams


def cpu_seconds() -> float:
    """CPU time so far of this process and of its children that live."""
    process = psutil.Process()
    total = time.process_time()
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def settle() -> None:
    """Wait until nobody works ahead any more: queues that others left half full would be counted as this row's work."""
    before, quiet = cpu_seconds(), 0
    for _ in range(int(SETTLE_SECONDS / SETTLE_STEP)):
        time.sleep(SETTLE_STEP)
        now = cpu_seconds()
        quiet = quiet + 1 if now - before < 0.1 * SETTLE_STEP else 0
        before = now
        if quiet == 2:
            return


def read(batch: Any) -> None:
    """One value of each cache line, by this thread alone: the threads that torch would take along spin while they wait for the
    next batch, which doubled the CPU time of a loader that is done within milliseconds.
    """
    import torch

    values = batch.view(torch.int16) if batch.dtype == torch.bfloat16 else batch  # NumPy has no bfloat16
    values.view(len(values), -1).numpy()[:, ::16].sum()


def turn(stream: Any, *, seconds: float, use: Callable[[Any], None] = read) -> tuple[float, float]:
    """Pairs per second and CPU microseconds per pair of one turn, with `use` made of each batch."""
    settle()
    for _ in range(WARM_UP_BATCHES):
        next(stream.batches)
    pairs, cpu, started = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - started < seconds or not pairs:
        batch = next(stream.batches)
        use(batch)
        pairs += len(batch)
    wall = time.perf_counter() - started
    return pairs / wall, 1e6 * (cpu_seconds() - cpu) / pairs


def measure(streams: list[Any], *, repeats: int) -> list[Record]:
    """The rows of a rung; the streams take turns."""
    turns: list[list[tuple[float, float, float]]] = [[] for _ in streams]
    for _ in range(repeats):
        for stream, results in zip(streams, turns, strict=True):
            unread, _ = turn(stream, seconds=0.5 * TURN_SECONDS, use=lambda _batch: None)
            results.append((*turn(stream, seconds=TURN_SECONDS), unread))
    rows: list[Record] = []
    for stream, results in zip(streams, turns, strict=True):
        rate, cpu, unread_rate = (timing.spread(values) for values in zip(*results, strict=True))
        rows.append(
            {
                "rung": stream.rung,
                "loader": stream.name,
                "encoding": stream.encoding,
                "threads": stream.threads,
                "pairs_per_second": rate.median,
                "pairs_per_second_low": rate.low,
                "pairs_per_second_high": rate.high,
                "cpu_us_per_pair": cpu.median,
                "cpu_us_per_pair_low": cpu.low,
                "cpu_us_per_pair_high": cpu.high,
                "loader_us_per_pair": cpu.median - (rows[0]["cpu_us_per_pair"] if rows else 0.0),
                "epoch_s": EPOCH_PAIRS / rate.median,
                "unread_epoch_s": EPOCH_PAIRS / unread_rate.median,
                "unread_epoch_s_low": EPOCH_PAIRS / unread_rate.high,
                "unread_epoch_s_high": EPOCH_PAIRS / unread_rate.low,
                "first_batch_ms": 1e3 * stream.first_batch_s,
                "same_pictures": stream.same_maths,
                **stream.facts,
            }
        )
    return rows


def table(rows: list[Record]) -> list[str]:
    """The rows as aligned text, cheapest first within a rung."""
    cells: list[Sequence[str]] = [COLUMNS]
    for row in sorted(rows, key=lambda row: (row["rung"], row["cpu_us_per_pair"])):
        same = [
            other for other in rows if (other["rung"], other["encoding"], other["loader"][:4]) == (row["rung"], row["encoding"], "ours")
        ]
        best = min((other["loader_us_per_pair"] for other in same), default=math.nan)
        cells.append(
            (
                row["rung"],
                row["loader"],
                row["encoding"],
                str(row["threads"]),
                f"{row['pairs_per_second']:,.0f} [{row['pairs_per_second_low']:,.0f}, {row['pairs_per_second_high']:,.0f}]",
                f"{row['cpu_us_per_pair']:.2f} [{row['cpu_us_per_pair_low']:.2f}, {row['cpu_us_per_pair_high']:.2f}]",
                f"{row['loader_us_per_pair']:.2f}",
                f"{row['loader_us_per_pair'] / best:.1f}",
                f"{row['epoch_s']:.3f}",
                f"{row['unread_epoch_s']:.3f}" if "unread_epoch_s" in row else "",
                f"{row['first_batch_ms']:.0f}",
                f"{row['resume_ms']:.1f}" if "resume_ms" in row else "",
                str(row.get("state_bytes", "")),
                "checked" if row["same_pictures"] else "its own random numbers",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def plot(rows: list[Record], path: Path) -> None:
    """CPU time per pair of the `full` rung as bars on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = sorted((row for row in rows if row["rung"] == "full" and row["encoding"]), key=lambda row: -row["loader_us_per_pair"])
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.32 * len(chosen)), layout="constrained")
    names = [f"{row['loader']}, {row['encoding']}, {row['threads']} threads" for row in chosen]
    bars = axes.barh(
        names, [row["loader_us_per_pair"] for row in chosen], color=["C0" if name.startswith("ours") else "C7" for name in names]
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xscale="log", xlabel="CPU time per 32x64 pair, fully augmented (microseconds)")
    figure.savefig(path)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    """Make the data, measure rung after rung, print, record; the exit codes are those of `pairclip-fast`."""
    asked, events = arguments(words), EventLog()
    keep_freed_memory()  # as the command line does
    rows: list[Record] = []
    code = 0
    if (load := os.getloadavg()[0]) > 0.5 * usable_cores():
        events.say(f"the machine is busy (load {load:.1f} on {usable_cores()} cores): trust CPU time and ratios, not pairs/s")
    try:
        with tempfile.TemporaryDirectory(prefix="pairclip-loader-") as root:
            folders = make_folders(Path(root), path=asked.path, pairs=asked.pairs, events=events)
            for rung in asked.rung:
                streams = open_streams(asked, folders, rung, events=events)
                events.say(f"{rung}: {len(streams)} rows, about {len(streams) * asked.repeats * 3 * TURN_SECONDS:.0f} s")
                rows += measure(streams, repeats=asked.repeats)
                for stream in streams:
                    stream.close()
            if asked.peers is not None:
                from loader_peer_worker import rows_of_environment

                rows += rows_of_environment(asked.peers, folders["raw"], rungs=asked.rung, batch_size=asked.batch_size, events=events)
    except PairclipError as error:
        sys.stderr.write(f"loader.py: {printable(error)}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        events.say("interrupted; what was finished:")
        code = 130
    if rows:
        print("\n".join(["", *table(rows)]))
        if asked.json:
            settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(asked).items()}
            timing.write_record(asked.json, name="loader", rows=rows, settings=settings)
        if asked.plot:
            plot(rows, asked.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
