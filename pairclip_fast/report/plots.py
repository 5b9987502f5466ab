"""The figures, as SVG that becomes part of the page; the only importer of matplotlib.

Colours are drawn as placeholders and become CSS variables of the page, so that a figure follows the reader's light or
dark setting. Text stays text. Identifiers are prefixed per figure (several figures share one document) and hashed with
a fixed salt, so that the same run gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (8.6, 3.9), (4.2, 2.7)
"""Inches; the page scales them."""
LEFT_INCHES, BOTTOM_INCHES, CHARACTER_INCHES = 0.62, 0.5, 0.074
SHORT_FROM = 1e4
"""Axis values from here on are written as 10 k."""
MAX_POINTS = 600
"""Points per line: a ten-hour run logs eighteen thousand steps, the screen has a thousand pixels."""
COLOURS = {"ink": "#010101", "muted": "#020202", "grid": "#030303", "c1": "#040404", "c2": "#050505", "c3": "#060606", "c4": "#070707"}
"""Placeholder of each CSS variable of the page."""
SERIES_COLOURS = ("c1", "c2", "c3", "c4")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a figure.

    Args:
        label: Written at its end, "" for none.
        x: Positions, float64.
        y: Values, float64; NaN breaks the line.
        colour: Name of a page colour.
        faint: Drawn thin and pale, behind.
        markers: Mark each point (few, measured separately).
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "c1"
    faint: bool = False
    markers: bool = False

    @property
    def empty(self) -> bool:
        """Nothing to draw."""
        return not np.any(np.isfinite(self.x) & np.isfinite(self.y))


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with samples seen on its x axis, or whatever `x_label` says.

    Args:
        name: Prefix of its identifiers; unique on the page.
        lines: Drawn in order; empty ones are left out.
        y_label: Quantity and unit.
        reference: (value, label) of a dashed horizontal line.
        pflop_per_sample: Adds a second x axis in PFLOP.
        percent: The y axis is 0 to 100 %.
        log_x: Logarithmic x axis.
        from_zero: The y axis includes zero.
    """

    name: str
    lines: list[Line]
    y_label: str
    x_label: str = "pairs seen"
    reference: tuple[float, str] | None = None
    pflop_per_sample: float = math.nan
    percent: bool = False
    log_x: bool = False
    from_zero: bool = False
    wide: bool = False
    resumes: tuple[float, ...] = ()


def render(plot: Plot) -> str:
    """`plot` as an `<svg>` element, "" if there is nothing to draw."""
    lines = [line for line in plot.lines if not line.empty]
    if not lines:
        return ""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=WIDE if plot.wide else NARROW)
        axes = figure.add_axes(_area(plot, lines))
        for line in lines:
            _draw(axes, line)
        _axes(axes, plot)
        _direct_labels(axes, lines)
        return _inline_svg(figure, plot.name)


def _area(plot: Plot, lines: list[Line]) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes in figure units, leaving room for what stands around them.

    Fixed margins: a layout engine draws each figure three times to find out what is known beforehand.
    """
    width, height = WIDE if plot.wide else NARROW
    right = max(0.12, *(CHARACTER_INCHES * len(line.label) + 0.12 for line in lines))
    top = 0.62 if plot.pflop_per_sample > 0 else 0.28 if plot.y_label else 0.1
    return LEFT_INCHES / width, BOTTOM_INCHES / height, (width - LEFT_INCHES - right) / width, (height - BOTTOM_INCHES - top) / height


def smooth(y: np.ndarray, *, window: int) -> np.ndarray:
    """Centred running median over `window` values, NaN ignored; narrower at the ends."""
    half = window // 2
    parts = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    return np.array([np.median(part[np.isfinite(part)]) if np.any(np.isfinite(part)) else math.nan for part in parts])


def thin(x: np.ndarray, y: np.ndarray, *, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of a long line: the mean of each of as many equal runs, and always its last value."""
    if len(x) <= points:
        return x, y
    groups = np.array_split(np.arange(len(x) - 1), points - 1)
    y_means = [np.mean(part[np.isfinite(part)]) if np.any(np.isfinite(part := y[group])) else math.nan for group in groups]
    return np.array([*(np.mean(x[group]) for group in groups), x[-1]]), np.array([*y_means, y[-1]])


@contextmanager
def _style() -> Iterator[None]:
    """Settings of every figure. `rc_context` restores the caller's; the defaults go first, so a user's file changes nothing."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "pairclip-fast",
                "text.parse_math": False,  # a class named $x_$ is a name, not a formula
                "font.size": 9.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "axes.edgecolor": COLOURS["muted"],
                "axes.labelcolor": COLOURS["muted"],
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                "grid.color": COLOURS["grid"],
                "grid.linewidth": 0.8,
                "text.color": COLOURS["ink"],
                "xtick.color": COLOURS["muted"],
                "ytick.color": COLOURS["muted"],
                "ytick.major.size": 0,
                "lines.linewidth": 1.8,
                "lines.solid_capstyle": "round",
                "lines.solid_joinstyle": "round",
            }
        )
        yield


def _draw(axes: Axes, line: Line) -> None:
    x, y = thin(line.x, line.y)
    axes.plot(
        x,
        y,
        color=COLOURS[line.colour],
        linewidth=0.8 if line.faint else 1.8,
        alpha=0.35 if line.faint else 1.0,
        marker="o" if line.markers and len(x) <= 80 else None,
        markersize=3.2,
    )


def _axes(axes: Axes, plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, PercentFormatter, ScalarFormatter

    axes.set_xlabel(plot.x_label)
    axes.set_title(plot.y_label, loc="left", fontsize=9.5, color=COLOURS["muted"])
    axes.margins(x=0.02)
    if plot.log_x:
        axes.set_xscale("log")
    short = FuncFormatter(lambda value, _position: _short(value))
    axes.xaxis.set_major_formatter(short)
    if plot.percent:
        axes.set_ylim(0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0, symbol=" %"))
    elif axes.get_ylim()[1] >= SHORT_FROM:
        axes.yaxis.set_major_formatter(short)
    else:
        plain = ScalarFormatter(useOffset=False)
        plain.set_powerlimits((-5, 5))
        axes.yaxis.set_major_formatter(plain)
    if plot.reference is not None:
        value, label = plot.reference
        axes.axhline(value, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            label,
            (0.995, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            color=COLOURS["muted"],
        )
    for position in plot.resumes:
        axes.axvline(position, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (1, 3)))
    if plot.from_zero:
        axes.set_ylim(bottom=0.0)
    if not plot.log_x:
        axes.set_xlim(left=0.0)
    per_sample = plot.pflop_per_sample

    def to_pflop(samples: Any) -> Any:
        return samples * per_sample

    def to_samples(pflop: Any) -> Any:
        return pflop / per_sample

    if math.isfinite(per_sample) and per_sample > 0.0:
        top = axes.secondary_xaxis("top", functions=(to_pflop, to_samples))
        top.set_xlabel("PFLOP of training")
        top.xaxis.set_major_formatter(short)
        top.spines["top"].set_visible(True)


def _direct_labels(axes: Axes, lines: list[Line]) -> None:
    """Each label at the end of its line, moved apart vertically where two would touch."""
    axes.get_ylim()  # settles the axes, so that data coordinates have a place
    height = 13.0 * axes.figure.dpi / 72.0
    ends = []
    for line in lines:
        last = int(np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))[-1])
        if line.label:
            ends.append((float(axes.transData.transform((line.x[last], line.y[last]))[1]), line, last))
    places = _apart([at for at, _, _ in sorted(ends, key=lambda end: end[0])], gap=height, top=float(axes.bbox.y1))
    for place, (at, line, last) in zip(places, sorted(ends, key=lambda end: end[0]), strict=True):
        axes.annotate(
            line.label,
            (line.x[last], line.y[last]),
            xytext=(6, (place - at) * 72.0 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            color=COLOURS[line.colour],
            annotation_clip=False,
        )


def _apart(ascending: list[float], *, gap: float, top: float) -> list[float]:
    """Positions at least `gap` apart and none above `top`, each as near to where it was as that allows."""
    places: list[float] = []
    for position in ascending:
        places.append(max(position, places[-1] + gap) if places else position)
    limit = top
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _short(value: float) -> str:
    """A tick: 1500000 as 1.5 M, 0.00025 as 2.5e-4."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == ' k' else size):.4g}{suffix}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):.3g}e{int(exponent)}"
    return f"{value:.4g}"


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an element: no XML head, no metadata, no namespaces (HTML knows them), no fixed fonts and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1)
    for variable, placeholder in COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text
