"""Held-out top-1 over the training spent, one line per preset and variant, with what the report hopes for beside them."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pairclip_fast.storage import write_atomic

REPORT_PFLOP, REPORT_TOP1 = 3.8, 5.0
"""The upper end of the report's expectation, in per cent, and what it would spend on it."""


def plot(groups: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Mean over seeds, from the lowest to the highest; the file's ending chooses the format.

    Args:
        groups: Records of runs (see `accuracy.record`) by the name of their line.
        path: Where to write.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for name, rows in groups.items():
        points = list(zip(*(row["curve"] for row in rows), strict=False))
        work = [point[0]["pflop"] for point in points]
        top1 = [[100 * one["top1"] for one in point] for point in points]
        (line,) = axes.plot(work, [statistics.mean(values) for values in top1], marker=".", label=f"{name} ({len(rows)})")
        axes.fill_between(work, [min(values) for values in top1], [max(values) for values in top1], color=line.get_color(), alpha=0.2)
    axes.plot([REPORT_PFLOP], [REPORT_TOP1], marker="o", fillstyle="none", color="#646b76", linestyle="", label="hoped for by the report")
    axes.set_xscale("log")
    axes.set_xlabel("training spent (PFLOP, logarithmic)")
    axes.set_ylabel("held-out top-1 (%)")
    axes.set_ylim(bottom=0.0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="preset, variant (seeds)")
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=150, format=path.suffix.removeprefix("."))
    write_atomic(path, drawing.getvalue())
