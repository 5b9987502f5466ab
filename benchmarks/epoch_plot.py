"""A drawing of the measured rates, with the report's claims as what they are: hollow bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from epoch_records import EpochRow
from epoch_tables import EPOCH_PAIRS, REPORT_CLAIMS, REPORT_PRESET

from pairclip_fast.errors import printable
from pairclip_fast.storage import write_atomic

BAR_INCHES = 0.32
NAME_CHARACTERS = 40
INK, PAPER, LINE = "#0f6f8c", "none", "#646b76"


def plot(rows: Sequence[EpochRow], path: Path) -> None:
    """Pairs per second of each row with the quartiles, on a logarithmic axis; the file's ending chooses the format.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    below = [row.pairs_per_second - row.pairs_per_second_low for row in rows]
    above = [row.pairs_per_second_high - row.pairs_per_second for row in rows]
    claims = {f"{device}: {REPORT_PRESET}, {size}": EPOCH_PAIRS / 60 / minutes for device, size, minutes, _ in REPORT_CLAIMS}
    machines = {row.machine for row in rows}
    figure = Figure(figsize=(9.0, 1.6 + BAR_INCHES * (len(rows) + len(claims))), layout="constrained")
    axes = figure.subplots()
    rates = [row.pairs_per_second for row in rows]
    axes.barh(labels(rows, machines), rates, xerr=[below, above], color=INK, label="measured: median and quartiles")
    axes.barh(list(claims), list(claims.values()), facecolor=PAPER, edgecolor=LINE, label="claimed by the report, never checked")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=min(*rates, *claims.values()) / 2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training pairs per second (logarithmic)")
    if len(machines) == 1:
        axes.set_title(printable(rows[0].machine, limit=80), fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=150, format=path.suffix.removeprefix("."))
    write_atomic(path, drawing.getvalue())


def labels(rows: Sequence[EpochRow], machines: set[str]) -> list[str]:
    """Names of the bars, each once (equal names would share a bar); the machine only where there are several."""
    names = []
    for row in rows:
        machine = "" if len(machines) == 1 else f"{printable(row.machine)[:NAME_CHARACTERS]}: "
        names.append(f"{machine}{printable(row.preset)[:NAME_CHARACTERS]}, {row.batch_size}, {row.precision}")
    return [name + " " * names[:place].count(name) for place, name in enumerate(names)]
