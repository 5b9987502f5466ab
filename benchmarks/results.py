"""The tables of `benchmarks/README.md`, made from the records: `python benchmarks/results.py` writes them anew.

A figure that is copied by hand goes stale or wrong, and nobody sees it. So every table there is what this file makes of
`benchmarks/records`, and a test compares. What a table leaves out and how its rows are called is said here; each figure is
the record's, rounded.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy import spread
from markdown_table import markdown_table

from pairclip_fast.storage import write_atomic

HERE = Path(__file__).parent
RESULTS = HERE / "README.md"
FORMATS = {"fp32": "float32", "bf16": "bfloat16"}
USUAL_PAIRS = 45_000
"""Training pairs of the accuracy runs, if nothing else is said: nine tenths of CIFAR-100's training images."""

ACCURACY = {
    "accuracy-baseline": "",
    "accuracy-enhanced": "",
    "accuracy-enhanced-our-recipe": "`our-recipe`",
    "accuracy-vit-6-epochs": "",
    "accuracy-vit": "",
    "accuracy-vit-seeds": "",
    "accuracy-vit-24-epochs": "",
    "accuracy-fast": "",
    "accuracy-fast-deeper": "`deeper`",
    "accuracy-fast-cutmix": "`cutmix`",
    "accuracy-fast-plain": "`plain`",
    "accuracy-fast-plain-seeds": "`plain`",
    "accuracy-fast-plain-avx2": "`plain`",
    "accuracy-fast-wide-end": "`plain`, last stage twice as wide",
    "accuracy-fast-full-whitening": "`plain`, `full-whitening`",
    "accuracy-fast-identity": "`plain`, filters begin as the identity",
    "accuracy-fast-short-steps": "`plain`, `short-steps`",
    "accuracy-fast-long-steps": "`plain`, `long-steps`",
    "accuracy-fast-no-prompt-ensemble": "`plain`, combinations of names left in the bank, whitened by half",
    "accuracy-fast-width-96": "`plain`, the same bank, 96 wide",
}
"""Records of whole runs, and what differs from the preset."""
CHANGES = {
    "unchanged": "nothing",
    "raw-bank": "raw text embeddings as the bank",
    "full-whitening": "bank whitened in full",
    "no-prompt-ensemble": "combinations of names left in the bank, whitened by half",
    "fixed-scale": "fixed temperature",
    "infonce": "InfoNCE within the batch instead of the softmax over all captions",
    "infonce-raw-bank": "InfoNCE within the batch, raw bank",
    "no-smoothing": "no label smoothing",
    "fixed-pairs": "the same pairs every epoch",
    "no-augmentation": "no augmentation",
    "random-flip": "coin flips instead of alternating ones",
    "no-shift": "no shift",
    "black-border": "black instead of mirrored borders",
    "cutout": "cutout added",
    "swapped-sides": "sides swapped at random",
    "mixup": "MixUp added",
    "cutmix": "CutMix added",
    "report-augmentation": "the report's rotation and colours",
    "adamw": "AdamW instead of Muon",
}
STEPS = (
    ("AMX", "train-step-enhanced-256-cpu", ("enhanced",)),
    ("AMX", "train-step-cpu", ("enhanced", "vit")),
    ("AMX", "train-step-fast-cpu", ("fast",)),
    ("AMD Zen 5", "train-step-amd-enhanced-256-cpu", ("enhanced",)),
    ("AMD Zen 5", "train-step-amd-cpu", ("enhanced", "vit", "fast")),
    ("AMD Zen 5", "train-step-amd-float32-cpu", ("enhanced", "vit", "fast")),
    ("AMD Zen 3 (AVX2)", "train-step-avx2-cpu", ("enhanced", "vit", "fast")),
    ("Intel AVX-512", "train-step-float32-cpu", ("enhanced", "vit", "fast")),
)
"""Processor, record, and the presets shown of it."""
PLAIN = ("eager", "autocast", "report", "report, image tower only")
KERNELS = {"AMX": "kernels-cpu", "AMD Zen 5": "kernels-amd-cpu", "AMD Zen 3 (AVX2)": "kernels-avx2-cpu"}
LOADERS = {
    "ours: native avx512_vbmi": "`native`, AVX-512 with VBMI and VNNI",
    "ours: native avx512": "`native`, AVX-512",
    "ours: native avx2": "`native`, AVX2",
    "ours: native portable": "`native`, portable build",
    "ours: twin": "its Python twin",
    "torch, resident, compiled": "torch, compiled, pictures in memory",
    "DALI stock CPU operators": "DALI, stock CPU operators",
    "PyTorch DataLoader, as the report": "PyTorch's DataLoader over PIL pictures, as the report does it",
    "webdataset + torchvision v2": "webdataset with torchvision",
    "ffcv": "ffcv",
    "litdata": "litdata",
    "SPDL": "SPDL",
    "grain": "grain",
    "MosaicML streaming": "MosaicML streaming",
}
WAITING = {
    "competition-cpu": "spin briefly, then sleep (ours)",
    "competition-sleeping-cpu": "sleep at once",
    "competition-spinning-cpu": "go on spinning (`OMP_WAIT_POLICY=ACTIVE`)",
}

Rows = list[dict[str, Any]]


def record(name: str) -> Rows:
    """The rows of a record."""
    rows: Rows = json.loads((HERE / "records" / f"{name}.json").read_text())["rows"]
    return rows


def ends(rows: Rows) -> str:
    """Top-1, 10 and 100 of runs that differ in nothing but the seed, in per cent."""
    cells = [spread([row["curve"][-1][name] for row in rows]) for name in ("top1", "top10", "top100")]
    return " / ".join(cell.removesuffix(" %") for cell in cells)


def accuracy_table() -> str:
    """Whole runs of the presets."""
    lines = []
    for name, difference in ACCURACY.items():
        rows = record(name)
        row = rows[0]
        end = row["curve"][-1]
        preset = ", ".join(filter(None, (f"`{row['preset']}`", difference)))
        training = f"{end['epoch']} epochs"
        if row["num_train"] != USUAL_PAIRS:
            training += f" of {row['num_train']:,} pairs, {row['num_val']:,} held out"
        numbers = FORMATS[row["precision"].split()[0]]
        lines.append((preset, training, f"{end['pflop']:.3f}", numbers, str(len(rows)), ends(rows), f"`{name}`"))
    return markdown_table(("preset", "training", "PFLOP", "number format", "seeds", "top-1 / 10 / 100 in %", "record"), lines)


def ablation_table(name: str) -> str:
    """One change at a time."""
    groups: dict[str, Rows] = {}
    for row in record(name):
        groups.setdefault(row["variant"], []).append(row)
    lines = [(CHANGES[variant], f"`{variant}`", ends(groups[variant])) for variant in CHANGES if variant in groups]
    return markdown_table(("changed", "variant", "top-1 / 10 / 100 in %"), lines)


def step_table() -> str:
    """Our training step against others."""
    lines = []
    for processor, name, presets in STEPS:
        rows = record(name)
        for preset in presets:
            found = {row["variant"]: row for row in rows if row["preset"] == preset}
            ours = found["ours"]
            faster = [found[variant]["ours_faster_by"] for variant in PLAIN]
            cells = [f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" for factor in faster]
            numbers = FORMATS[ours["precision"]]
            lines.append(
                (f"{processor}, {numbers}", f"`{preset}`, {ours['batch_size']}", *cells, f"{100 * ours['of_bound']:.0f} %", f"`{name}`")
            )
    others = ("plain float32", "plain autocast", "report", "its image tower")
    return markdown_table(("processor, ours in", "preset, batch", *others, "of the bound", "record"), lines)


def kernel_table() -> str:
    """Seconds of every variant of a job, by processor."""
    found = {processor: {(row["job"], row["variant"]): row["wall_s"] for row in record(name)} for processor, name in KERNELS.items()}
    jobs = next(iter(found.values()))
    lines = [(job, variant, *(f"{seconds[job, variant]:.3f}" for seconds in found.values())) for job, variant in jobs]
    return markdown_table(("job", "variant", *KERNELS), lines)


def loader_table() -> str:
    """CPU time per pair on two rungs, two threads, pictures as raw bytes, less what reading the batches costs."""
    rows = [row for row in record("loader-cpu") if row["encoding"] not in ("png", "jpeg")]
    reading = {row["rung"]: row["cpu_us_per_pair"] for row in rows if row["loader"] == "reading alone"}
    measured = [row for row in rows if row["threads"] == 2]
    lines = []
    for name, label in LOADERS.items():
        found = {row["rung"]: row["cpu_us_per_pair"] - reading[row["rung"]] for row in measured if row["loader"] == name}
        lines.append((label, *(_microseconds(found.get(rung)) for rung in ("normalise", "full"))))
    return markdown_table(("loader", "read and normalise", "all augmentations: rotation, colour, flip"), lines)


def _microseconds(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1f}" if value < 20 else f"{value:,.0f}"


def waiting_table() -> str:
    """A step alone and beside busy programs."""
    lines = []
    for name, label in WAITING.items():
        (ours,) = (row for row in record(name) if row["variant"] == "ours")
        lines.append((label, f"{ours['alone_wall_s']:.3f}", f"{ours['beside_wall_s']:.3f}", f"`{name}`"))
    return markdown_table(("idle threads", "alone", "beside", "record"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "ablations, three seeds": lambda: ablation_table("ablations-fast-headline"),
    "ablations, one seed": lambda: ablation_table("ablations-fast"),
    "training step": step_table,
    "kernels": kernel_table,
    "loader": loader_table,
    "waiting": waiting_table,
}


def with_tables(text: str) -> str:
    """The text with every table between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", fresh, text, flags=re.DOTALL)


def main() -> int:
    """Write the tables."""
    write_atomic(RESULTS, with_tables(RESULTS.read_text()).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
