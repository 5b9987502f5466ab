"""The tables of `epoch_time`: what was measured, what the report claims, what a GPU could do at best, and the memory.

Each figure stands in a table whose title says what kind of figure it is; a GPU appears with a measured figure only where one
was measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from epoch_records import EpochRow
from markdown_table import markdown_table

from pairclip_fast.config import RunConfig, load_preset
from pairclip_fast.errors import printable
from pairclip_fast.gpus import GPUS, Gpu

if TYPE_CHECKING:
    from pairclip_fast.telemetry.roofline import Work

EPOCH_PAIRS = 50_000
"""Pairs of an epoch: one per CIFAR-100 training image, as in the report."""
REPORT_CLAIMS = (("RTX 3080", 32, 3, "~1 h"), ("RTX 2080", 32, 5, "~1.7 h"), ("GTX 1060", 16, 8, "~2.7 h"), ("CPU", 8, 45, "~15 h"))
"""Device, batch size, minutes per epoch and time in all of `enhanced`, from the report's section 3.2. Nobody has checked them."""
REPORT_PRESET = "enhanced"
REPORT_MEMORY = ("the report's claim", "~15 M", "~60 MB", "", "", "", "", "~2 GB (GPU, batch 32)", "~4 GB (GPU)")
"""From its section 3.3."""
CAPTIONS, RAW_DIM = 10_000, 512
"""The report's bank: all pairs of 100 classes, CLIP ViT-B's width."""
TILE = 32
OLDEST_CAPABILITY = (7, 5)
"""Of the CUDA 13 builds of torch, which the default index gives (torch 2.14: sm_75 to sm_120)."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, cells, and what the reader must know about them."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *body, *self.notes])

    def markdown(self) -> str:
        """For a README."""
        return "\n".join([f"**{self.title}**", "", markdown_table(self.columns, self.rows), "", *(f"- {note}" for note in self.notes)])


def measured_table(rows: Sequence[EpochRow], *, missing_gpu: bool) -> Table:
    """The measured rows; where there was no GPU, one line that says so."""
    columns = (
        "machine",
        "preset",
        "batch",
        "format",
        "minutes per epoch",
        "in all",
        "pairs/s",
        "TFLOP/s",
        "of peak",
        "data wait",
        "compiling",
        "peak GiB",
    )
    cells = [_measured(row, rows) for row in rows]
    if missing_gpu:
        cells.append(("any GPU", "all", "", "", "not measured", *("",) * (len(columns) - 5)))
    whole = rows and not any(row.extrapolated for row in rows)
    how = "of whole epochs" if whole else "extrapolated from steady-state steps (--full measures whole epochs)"
    return Table(
        "Measured",
        columns,
        cells,
        (
            f"minutes per epoch of {EPOCH_PAIRS:,} pairs: median [quartiles], training only, {how}; in all: times the preset's epochs",
            "format: what --amp chose; of peak: of a large matrix product in that format, measured on the same machine",
            "(TFLOP/s count convolutions by their definition; minimal filtering does with less, and may so be beyond 100 %)",
            "peak GiB: of the process while it trained (on a GPU of torch's pool)",
        ),
    )


def _measured(row: EpochRow, rows: Sequence[EpochRow]) -> tuple[str, ...]:
    low, middle, high = (seconds / 60 for seconds in (row.epoch_s_low, row.epoch_s, row.epoch_s_high))
    return (
        printable(row.machine, limit=60),
        printable(row.preset, limit=30),
        str(row.batch_size),
        row.precision,
        f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        hours(row.epoch_s * row.epochs),
        f"{row.pairs_per_second:,.0f}",
        f"{row.tflops:.3g}",
        f"{row.tflops / best_peak(row, rows):.0%}",
        f"{row.data_wait_fraction:.1%}",
        f"{row.compile_s:.1f} s" if row.compile == "compiled" else "",
        "" if row.training_peak_gib is None else f"{row.training_peak_gib:.2f}",
    )


def best_peak(row: EpochRow, rows: Sequence[EpochRow]) -> float:
    """The best TFLOP/s of a large matrix product on this row's machine and format; one look alone may meet a busy moment."""
    kind = (row.machine, row.device, row.precision)
    return max(other.peak_tflops for other in rows if (other.machine, other.device, other.precision) == kind)


def hours(seconds: float) -> str:
    """A long time in the unit that fits."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def claims_table() -> Table:
    """The report's rows: what it claims, what that implies, and the least time by the roofline."""
    gflop, cells = step_cost(REPORT_PRESET, 32).gflop_per_pair, []
    for name, batch_size, minutes, total in REPORT_CLAIMS:
        rate = EPOCH_PAIRS / 60 / minutes
        gpu = next((gpu for gpu in GPUS if gpu.name == name), None)
        share = "" if gpu is None else f"{rate * gflop / 1e3 / gpu.tflops:.1%}"
        least = "" if gpu is None else f"{least_epoch_s(gpu, REPORT_PRESET, batch_size):.0f} s"
        cells.append((name, str(batch_size), f"~{minutes} (claim)", total, f"{rate:,.0f}", f"{rate * gflop / 1e3:.2f}", share, least))
    old = ", ".join(gpu.name for gpu in GPUS if gpu.capability < OLDEST_CAPABILITY)
    return Table(
        f"Claims of the report this project grew from, for preset {REPORT_PRESET}",
        ("device", "batch", "minutes per epoch", "in all", "implied pairs/s", "implied TFLOP/s", "of published peak", "roofline: at least"),
        cells,
        (
            "claim: nobody has checked it, and its epoch runs the text encoder too, which is not in the implied TFLOP/s",
            "roofline: an estimate, see below; not measured",
            f"{old}: too old for the CUDA 13 builds of torch (compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} and newer)",
        ),
    )


def estimates_table(presets: Sequence[str]) -> Table:
    """The least time of an epoch per GPU and preset, from published peaks."""
    sizes = {preset: load_preset(preset).train.batch_size for preset in presets}
    cells = [
        (
            *(gpu.name, gpu.matrix_format, f"{gpu.tflops:g}", f"{gpu.bandwidth_gb_s:g}", f"{gpu.memory_gib}"),
            *(f"{least_epoch_s(gpu, preset, size):.2g}" for preset, size in sizes.items()),
        )
        for gpu in GPUS
    ]
    return Table(
        "Estimates, not measured: least seconds per epoch by the roofline, at the preset's batch size",
        ("GPU", "format", "TFLOP/s", "GB/s", "GiB", *(f"{preset} ({size})" for preset, size in sizes.items())),
        cells,
        (
            "least: every operation at the published peak of computing or of memory; launches, loader and unfilled waves are not in it",
            "published peaks: dense, accumulating in float32; sources in pairclip_fast/gpus.py",
        ),
    )


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a roofline needs of a training step."""

    gflop_per_pair: float
    parameters: int
    work: list[Work]


@functools.cache
def step_cost(preset: str, batch_size: int, format_name: str = "bf16", *, tile: int = TILE) -> StepCost:
    """Operations of a step of a preset on tiles of `tile` pixels with the report's bank, counted once."""
    import torch

    from pairclip_fast.models.build import build_model, count_parameters
    from pairclip_fast.telemetry.roofline import step_work

    config = load_preset(preset)
    with torch.device("meta"):
        model = build_model(config.model, tiles=2, tile_size=(TILE, TILE), dim=bank_dim(config))
    captions = CAPTIONS if config.loss.kind == "bank" else 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[format_name]
    work = step_work(model, image_shape=(3, tile, 2 * tile), num_captions=captions, batch_size=batch_size, dtype=dtype)
    return StepCost(sum(one.flops for one in work) / batch_size / 1e9, count_parameters(model), work)


def bank_dim(config: RunConfig) -> int:
    """Width of the bank that a preset trains against."""
    return config.bank.rank if config.bank.kind == "whiten" else RAW_DIM


def least_epoch_s(gpu: Gpu, preset: str, batch_size: int) -> float:
    """Least seconds of an epoch by the roofline."""
    from pairclip_fast.telemetry.roofline import least_seconds

    step_s = 0.0
    for tile, share in load_preset(preset).train.progressive or ((TILE, 1.0),):
        cost = step_cost(preset, batch_size, gpu.matrix_format, tile=tile)
        step_s += share * least_seconds(cost.work, gpu, parameters=cost.parameters)
    return EPOCH_PAIRS / batch_size * step_s


def memory_table(rows: Sequence[EpochRow]) -> Table:
    """The report's memory table with our numbers: counted, and measured beside it."""
    columns = (
        "preset, batch, machine",
        "parameters",
        "on disk",
        "model + bank",
        "gradients",
        "optimizer",
        "activations",
        "training peak",
        "evaluation peak",
    )
    cells = [_memory(row) for row in rows]
    return Table(
        "Memory: counted from the tensors, and the measured peaks",
        columns,
        [*cells, REPORT_MEMORY],
        (
            "peaks: measured; in brackets without what the process held before the model was there (libraries, captions)",
            "activations: kept by autograd for one batch; the peaks also hold workspaces, fragments of the allocator and shards read",
        ),
    )


def _memory(row: EpochRow) -> tuple[str, ...]:
    counted = [f"{1024 * size:,.0f} MiB" if (size := row.counted_gib.get(item)) is not None else "" for item in COUNTED]
    peaks = [
        "" if peak is None or row.held_gib is None else f"{peak:.2f} GiB ({max(peak - row.held_gib, 0.0):.2f})"
        for peak in (row.training_peak_gib, row.evaluation_peak_gib)
    ]
    name = f"{printable(row.preset, limit=30)}, {row.batch_size}, {row.device} {row.precision}"
    return (name, f"{row.parameters:,}", f"{row.disk_bytes / 1e6:,.1f} MB", *counted, *peaks)


COUNTED = ("model", "gradients", "optimizer", "activations")
