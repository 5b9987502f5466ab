"""`pairclip-fast report`: write the page into the run folder and say what is on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairclip_fast.errors import printable
from pairclip_fast.events import EventLog
from pairclip_fast.report.data import read_run
from pairclip_fast.report.history import fallbacks
from pairclip_fast.report.html import page
from pairclip_fast.report.results import headline, ratio_to_chance
from pairclip_fast.report.words import shown
from pairclip_fast.storage import write_atomic

REPORT_NAME = "report.html"


def run_report(run: Path, *, events: EventLog) -> dict[str, Any]:
    """Write `run/report.html`, one file that needs nothing else, and summarise it.

    Works for a run that is still going or was killed. Only `report.html` is written; the run is not locked.

    Args:
        run: The run folder.
        events: Told about files that could not be read.

    Returns:
        `path`, `bytes`, `state` ("finished", "stopped", "failed", "open"), `sentence`, `split`, `metrics` (plain numbers of that
        split), `ratio_to_chance` of top-1 (None where unknown), `fallbacks` and `problems`.

    Raises:
        DataError: not a run folder.
        StorageError: the page cannot be written.
    """
    record = read_run(run)
    for problem in record.problems:
        events.note(f"report: {problem}")
    text = page(record).encode("ascii")
    path = run / REPORT_NAME
    write_atomic(path, text)
    first = next(iter(record.evaluations.values()), None)
    top = headline(record)
    ratio = ratio_to_chance(first) if first else None
    return {
        "path": str(path),
        "bytes": len(text),
        "state": top.state,
        "sentence": top.sentence,
        "split": top.split,
        "metrics": {key: value for key, value in (first.metrics if first else {}).items() if isinstance(value, int | float)},
        "ratio_to_chance": round(ratio, 3) if ratio is not None and ratio == ratio else None,
        "fallbacks": len(fallbacks(record)),
        "problems": record.problems,
    }


def render_report(summary: dict[str, Any]) -> str:
    """The summary of `run_report` in words; the last line is the path."""
    lines = [shown(summary["sentence"], limit=400)]
    if summary["fallbacks"]:
        lines.append(f"{summary['fallbacks']} fallbacks were taken; the report lists them with their reasons")
    lines.extend(f"incomplete: {shown(problem, limit=400)}" for problem in summary["problems"])
    return "\n".join([*lines, f"report: {printable(summary['path'])}"])
