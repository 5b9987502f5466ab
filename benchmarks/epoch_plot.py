"""A drawing of the measured rates, with the report's claims as what they are: hollow bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from epoch_records import EpochRow
from epoch_tables import EPOCH_PAIRS, REPORT_CLAIMS, REPORT_PRESET

from pairclip_fast.errors import printable

BAR_INCHES = 0.32


def plot(rows: Sequence[EpochRow], path: Path) -> None:
    """Pairs per second of each row with the quartiles, on a logarithmic axis; the file's ending chooses the format.

    Raises:
        ValueError: matplotlib does not know the ending.
    """
    from matplotlib.figure import Figure

    names = [f"{printable(row.machine, limit=40)}: {printable(row.preset, limit=20)}, {row.batch_size}, {row.precision}" for row in rows]
    rates = [row.pairs_per_second for row in rows]
    spread = [
        [row.pairs_per_second - row.pairs_per_second_low for row in rows],
        [row.pairs_per_second_high - row.pairs_per_second for row in rows],
    ]
    claims = [(f"claim, {device}: {REPORT_PRESET}, {size}", EPOCH_PAIRS / 60 / minutes) for device, size, minutes, _ in REPORT_CLAIMS]
    figure = Figure(figsize=(8.0, 1.2 + BAR_INCHES * (len(rows) + len(claims))), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, rates, xerr=spread, color="#0f6f8c", label="measured: median and quartiles")
    axes.barh(
        [name for name, _ in claims], [rate for _, rate in claims], facecolor="none", edgecolor="#646b76", label="claimed by the report"
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("training pairs per second")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
