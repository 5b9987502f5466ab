"""The figure of `kernels.py`: time and memory against the size of the bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figure; time in proportion to the bank and memory flat is what one hopes to see."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for job in dict.fromkeys(row["job"] for row in rows):
        line = [row for row in rows if row["job"] == job]
        captions = [row["captions"] for row in line]
        time.plot(captions, [row["wall_s"] for row in line], marker="o", label=job)
        if all(row["extra_mib"] is not None for row in line):
            memory.plot(captions, [max(row["extra_mib"], 0.0) for row in line], marker="o", label=job)
    batch, last = rows[0]["rows"], rows[-1]["captions"]
    memory.axhline(4 * batch * last / 2**20, linestyle="--", color="grey", label=f"float32 scores of {last:,} captions")
    for axes, what in ((time, "seconds"), (memory, "MiB beside the inputs")):
        axes.set(xscale="log", xlabel=f"captions in the bank ({batch} rows)", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    time.set_yscale("log")
    memory.set_ylim(bottom=0)
    figure.savefig(path)
