"""Records of `epoch_time`: their layout, and the checks that a record of another machine has to pass before it is shown.

A record comes from a file that anybody may have written. Its types and ranges are checked, and that its figures agree with
each other; what does not pass is refused with the reason. Text from it is shortened and stripped of control characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from pairclip_fast.errors import DataError, printable

BENCHMARK = "epoch_time"
FORMAT = 2
LARGEST_RECORD_BYTES = 4 << 20
AGREEMENT = 1e-3
"""Relative; figures of one row that follow from each other."""
SAVED = 4.0
"""Of the multiplications that are counted, minimal filtering leaves out this many for one that it does (9 * 16 / 36)."""
FASTEST_OF_PEAK = 1.2 * SAVED
"""A step cannot beat the measured matrix peak by more: one look at the peak may have met a busy moment."""

Positive = Annotated[float, msgspec.Meta(gt=0.0, lt=1e15)]
NotNegative = Annotated[float, msgspec.Meta(ge=0.0, lt=1e15)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One measured configuration."""

    machine: Text
    """Name of the GPU, or of the processor with its threads."""
    device: Literal["cpu", "cuda"]
    preset: Text
    epochs: Count
    """Of the preset."""
    batch_size: Count
    precision: Literal["fp32", "bf16", "fp16"]
    loader: Text
    compile: Text
    compile_s: NotNegative
    parameters: Count
    gflop_per_pair: Positive
    repeats: Count
    steps_per_repeat: Count
    extrapolated: bool
    """From stretches of steps, not from a whole epoch."""
    pairs_per_second: Positive
    pairs_per_second_low: Positive
    pairs_per_second_high: Positive
    epoch_pairs: Count
    epoch_s: Positive
    epoch_s_low: Positive
    epoch_s_high: Positive
    tflops: Positive
    peak_tflops: Positive
    data_wait_fraction: Share
    time_share: dict[Text, Share]
    """Of the measured steps, by phase."""
    cpu_s_per_wall_s: NotNegative
    held_gib: NotNegative | None
    """By the process before the model was there; on a GPU by torch's pool."""
    training_peak_gib: NotNegative | None
    evaluation_peak_gib: NotNegative | None
    disk_bytes: Count
    """Of the weights as a checkpoint saves them."""
    counted_gib: dict[Text, NotNegative]
    """Memory that can be counted, by item."""
    loss: float
    reference_loss: float

    def __post_init__(self) -> None:
        check(self.epoch_s_low <= self.epoch_s <= self.epoch_s_high, "the time of an epoch lies outside its own spread")
        check(agree(self.epoch_s, self.epoch_pairs / self.pairs_per_second), "time of an epoch and pairs per second disagree")
        check(agree(self.tflops, self.pairs_per_second * self.gflop_per_pair / 1e3), "TFLOP/s and pairs per second disagree")
        check(self.tflops <= FASTEST_OF_PEAK * self.peak_tflops, "faster than the machine's own peak")
        check(agree(sum(self.time_share.values()), 1.0), "the phases of a step do not sum to its time")
        check(agree(self.loss, self.reference_loss, within=0.05), "the loss was not that of the reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one machine measured."""

    format: Literal[2]
    benchmark: Literal["epoch_time"]
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: Annotated[list[EpochRow], msgspec.Meta(min_length=1, max_length=1000)]


def check(condition: bool, message: str) -> None:  # noqa: FBT001  (reads like assert)
    """Raise what msgspec reports as a validation error."""
    if not condition:
        raise ValueError(message)


def agree(one: float, other: float, *, within: float = AGREEMENT) -> bool:
    """Whether two figures are the same but for rounding."""
    return abs(one - other) <= within * max(abs(one), abs(other))


def read_record(path: Path) -> EpochRecord:
    """One record.

    Raises:
        DataError: it cannot be read, or is no record that could be true.
    """
    fix = "send the file that `epoch_time.py --json` wrote, unchanged"
    try:
        if path.stat().st_size > LARGEST_RECORD_BYTES:
            raise DataError("the record is too long", where=path, expected=f"at most {LARGEST_RECORD_BYTES:,} bytes", fix=fix)
        return msgspec.json.decode(path.read_bytes(), type=EpochRecord)
    except OSError as error:
        raise DataError("the record cannot be read", where=path, got=error.strerror) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError("not a record of epoch_time that can be believed", where=path, got=printable(error, limit=300), fix=fix) from error


def merge(paths: Iterable[Path]) -> tuple[list[EpochRow], list[DataError]]:
    """The rows of many records, in order of machine and preset, and the records that were refused.

    Of the same machine, preset, batch and format the last one counts.
    """
    rows: dict[tuple[str, str, str, int, str], EpochRow] = {}
    refused: list[DataError] = []
    for path in paths:
        try:
            for row in read_record(path).rows:
                rows[row.device, row.machine, row.preset, row.batch_size, row.precision] = row
        except DataError as error:
            refused.append(error)
    return [rows[key] for key in sorted(rows)], refused
