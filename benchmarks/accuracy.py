"""Held-out accuracy over training FLOPs: presets over seeds, as curves that can be compared.

A run is an ordinary `pairclip-fast train` run, continued where it was stopped and not repeated once it has ended, so this
command can be interrupted at any time and asked again. Every figure comes from the run's own event log: validation
images that no training pair contains, all captions ranked, ties against us. One epoch's weights are one point of a curve;
only the last one has seen the whole learning-rate schedule. Variants (`ablations.toml`) ask what a single choice is worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy_plot
import timing
import tomli_w

from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.config import preset_names, read_toml
from pairclip_fast.data.manifest import Manifest, read_manifest
from pairclip_fast.data.places import default_folder
from pairclip_fast.errors import ConfigError, PairclipError, printable
from pairclip_fast.events import Event, EventLog, last_attempts, read_events
from pairclip_fast.openmp import spin_briefly
from pairclip_fast.storage import write_atomic
from pairclip_fast.text.bank import CaptionBank
from pairclip_fast.train.options import TrainOptions
from pairclip_fast.train.setup import BANK

METRICS = ("top1", "top10", "top100", "mrr", "left_top1", "right_top1", "swap_rate", "loss")
EXIT_INTERRUPTED = 130


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="accuracy.py", description="Held-out accuracy of presets over seeds.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=default_folder(), help="data folder with a val split (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of the runs (default: runs/accuracy)")
    parser.add_argument("--preset", nargs="+", choices=preset_names(), metavar="NAME", default=["fast"], help="presets (default: fast)")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", default=[0], help="seeds (default: 0)")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training pairs (default: the preset's)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML tables laid over every preset")
    parser.add_argument("--variants", type=Path, metavar="FILE", help="TOML file of named tables, each laid over every preset in turn")
    parser.add_argument("--variant", nargs="+", metavar="NAME", help="of these variants (default: all in the file)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the curves, with the environment, to this file")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the curves (PNG or SVG)")
    return parser.parse_args(words)


def chosen_variants(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Configuration tables by the name of the variant; one without a name if there are none.

    Raises:
        ConfigError: the file cannot be read, or does not have a variant that was asked for.
    """
    if asked.variants is None:
        if asked.variant:
            raise ConfigError("variants come from a file", where="--variant", fix="add --variants benchmarks/ablations.toml")
        return {"": {}}
    known = read_toml(asked.variants)
    names = asked.variant or list(known)
    for name in names:
        if not isinstance(known.get(name), dict):
            raise ConfigError("there is no such variant", where=asked.variants, expected=", ".join(known), got=name)
    return {name: known[name] for name in names}


def write_variant(tables: dict[str, Any], *, over: Path | None, path: Path) -> Path:
    """The config file of a variant: its tables laid over those of another file."""
    merged = read_toml(over) if over is not None else {}
    for table, value in tables.items():
        merged[table] = merged.get(table, {}) | value if isinstance(value, dict) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tomli_w.dumps(merged).encode())
    return path


def train_one(options: TrainOptions, *, data: Path, run: Path) -> dict[str, Any]:
    """Train (or continue, or only read) one run; its record."""
    from pairclip_fast.train.commands import run_train

    run_train(dataclasses.replace(options, data=data, out=run))
    return record(run, read_manifest(data))


def record(run: Path, manifest: Manifest) -> dict[str, Any]:
    """Configuration, cost and held-out curve of a run, from its event log."""
    events = last_attempts(read_events(run / "events.jsonl"))
    started = [event for event in events if event["event"] == "run_started"][-1]
    finished = [event for event in events if event["event"] == "finished"][-1]
    plan = started["plan"]
    losses: dict[int, list[float]] = {}
    for event in events:
        if event["event"] == "step":
            losses.setdefault(event["epoch"], []).append(event["loss"])
    batch_size = started["config"]["train"]["batch_size"]
    bank = CaptionBank.load(run / BANK)
    curve = [point(event, batch_size=batch_size, losses=losses.get(event["epoch"], [])) for event in events if event["event"] == "eval"]
    return {
        "preset": started["config"]["preset"],
        "seed": started["config"]["train"]["seed"],
        "config": started["config"],
        "source": manifest.source,
        "data_digest": manifest.digest,
        "text_encoder": {"name": bank.encoder, "model": bank.model, "digest": bank.digest},
        "num_train": plan["num_train"],
        "num_val": plan["num_val"],
        "num_captions": plan["num_captions"],
        "parameters": plan["parameters"],
        "flops_per_pair": plan["flops_per_pair"],
        "precision": plan["precision"],
        "commit": json.loads((run / "environment.json").read_text())["git_commit"],
        "ended": finished["reason"],
        "seconds": finished["seconds"],
        "curve": curve,
    }


def point(event: Event, *, batch_size: int, losses: Sequence[float]) -> dict[str, Any]:
    """One evaluation of a curve, and the mean training loss of its epoch's logged steps: with augmentation and label smoothing."""
    cost = {"epoch": event["epoch"] + 1, "samples_seen": event["step"] * batch_size, "pflop": event["pflop"]}
    training = {"train_loss": statistics.fmean(losses)} if losses else {}
    return cost | training | {name: event["metrics"][name] for name in METRICS if name in event["metrics"]}


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ in nothing but the seed, by preset and variant."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(" ".join(filter(None, (row["preset"], row["variant"]))), []).append(row)
    return groups


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per preset and variant: the last point of the curve, mean over seeds and their sample standard deviation."""
    lines = [f"{'preset':28} {'seeds':>5} {'epochs':>6} {'PFLOP':>8} {'top-1':>14} {'top-10':>14} {'top-100':>14}"]
    for name, group in by_name(rows).items():
        ends = [row["curve"][-1] for row in group]
        cells = [spread([end[name] for end in ends]) for name in ("top1", "top10", "top100")]
        lines.append(f"{name:28} {len(ends):5} {ends[0]['epoch']:6} {ends[0]['pflop']:8.4f} " + " ".join(f"{cell:>14}" for cell in cells))
    return lines


def spread(values: list[float]) -> str:
    """Mean, and with more than one value the sample standard deviation, in per cent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} %" if len(values) == 1 else f"{mean} +- {100 * statistics.stdev(values):.2f} %"


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table, write the record; the exit codes are those of `pairclip-fast`."""
    asked, rows = arguments(words), []
    keep_freed_memory()
    spin_briefly()
    base = TrainOptions(epochs=asked.epochs, config=asked.config, amp=True, resume=True)
    code = 0
    try:
        variants = chosen_variants(asked)
        for preset, variant, seed in itertools.product(asked.preset, variants, asked.seed):
            name = "-".join(filter(None, (preset, variant)))
            EventLog().say(f"{name}, seed {seed}")
            config = write_variant(variants[variant], over=asked.config, path=asked.out / f"{name}.toml") if variant else asked.config
            options = dataclasses.replace(base, preset=preset, seed=seed, config=config)
            rows.append(train_one(options, data=asked.data, run=asked.out / f"{name}-seed{seed}") | {"variant": variant})
    except PairclipError as error:
        sys.stderr.write(f"accuracy.py: {printable(error)}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if rows:
        print("\n".join(table(rows)))
        if asked.json:
            settings = {"epochs": asked.epochs, "seeds": asked.seed, "presets": asked.preset, "variants": sorted(variants)}
            timing.write_record(asked.json, name="accuracy", rows=rows, settings=settings)
        if asked.plot:
            accuracy_plot.plot(by_name(rows), asked.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
