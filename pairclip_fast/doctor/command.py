"""`pairclip-fast doctor`: all answers as one value, as text, and as an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pairclip_fast import __version__
from pairclip_fast.doctor import machine, training
from pairclip_fast.doctor.check import Check, attempt
from pairclip_fast.errors import EnvironmentLackingError, printable
from pairclip_fast.events import EventLog

FORMAT = 1
MARKS = {"ok": "ok", "fallback": "fallback", "missing": "MISSING"}
STYLES = {"ok": "green", "fallback": "yellow", "missing": "bold red"}


def run_doctor(*, events: EventLog, folder: Path | None = None, verify: bool = False) -> dict[str, Any]:
    """Ask every room what it would do here. Changes nothing; takes seconds, most of them for importing torch.

    Args:
        events: Shows progress.
        folder: Where data and runs would be written; the current folder by default.
        verify: Also check and time the kernels.

    Returns:
        `format`, `version`, `can_train`, and `checks`: a list of {topic, status, found, reason, fix}, all strings. With
        `verify` also `kernels`, see `verify_kernels`.
    """
    folder = folder or Path.cwd()
    probes: dict[str, Callable[[], Check]] = {
        "python": machine.check_python,
        "cpu": machine.check_cpu,
        "instructions": machine.check_instructions,
        "memory": machine.check_memory,
        "disk": partial(machine.check_disk, folder),
        "packages": training.check_packages,
        "torch": training.check_torch,
        "gpu": training.check_gpu,
        "--amp": training.check_precision,
        "torch.compile": training.check_compiler,
        "loader": training.check_loader,
        "kernels": training.check_kernels,
        "transformer blocks": training.check_blocks,
        "convolutional stages": training.check_stages,
        "text encoder": training.check_text_encoder,
        "extras": training.check_extras,
        "data": training.check_data,
    }
    checks: list[Check] = []
    with events.progress("asking", total=len(probes), unit="topics") as advance:
        for topic, probe in probes.items():
            checks.append(attempt(topic, probe))
            advance(1)
    summary = {
        "format": FORMAT,
        "version": __version__,
        "can_train": all(check.status != "missing" for check in checks),
        "checks": [{name: printable(value).replace("\n", " ") for name, value in _fields(check).items()} for check in checks],
    }
    if verify:
        import torch

        from pairclip_fast.doctor.kernels import verify_kernels

        summary["kernels"] = verify_kernels(torch.device(training.training_device()), events=events)
    return summary


def refuse_if_lacking(summary: dict[str, Any]) -> None:
    """End with exit code 5 if training cannot work or a kernel is wrong; call it after the summary was shown.

    Raises:
        EnvironmentLackingError: names what is missing or wrong.
    """
    missing = [check for check in summary["checks"] if check["status"] == "missing"]
    if missing:
        what = "; ".join(f"{check['topic']}: {check['found']}" for check in missing)
        fix = "; ".join(check["fix"] for check in missing if check["fix"])
        raise EnvironmentLackingError("training cannot work on this machine", got=what, fix=fix or None)
    if "kernels" in summary:
        from pairclip_fast.doctor.kernels import refuse_wrong_kernels

        refuse_wrong_kernels(summary["kernels"])


def render_doctor(summary: dict[str, Any]) -> str:
    """The answers as a table for a terminal, as plain lines for everything else."""
    answers = _table(summary) if sys.stdout.isatty() else _lines(summary)
    if "kernels" not in summary:
        return answers
    from pairclip_fast.doctor.kernels import render_verification

    return f"{answers}\n\n{render_verification(summary['kernels'])}"


def _fields(check: Check) -> dict[str, str]:
    return {"topic": check.topic, "status": check.status, "found": check.found, "reason": check.reason, "fix": check.fix}


def _verdict(summary: dict[str, Any]) -> str:
    fallbacks = sum(check["status"] == "fallback" for check in summary["checks"])
    if not summary["can_train"]:
        return "Training cannot work here: see what is MISSING."
    if not fallbacks:
        return "Training works here, with the best of everything."
    return f"Training works here, with {fallbacks} fallback{'s' if fallbacks != 1 else ''}."


def _lines(summary: dict[str, Any]) -> str:
    lines = []
    for check in summary["checks"]:
        reason = f" ({check['reason']})" if check["reason"] else ""
        fix = f" -> {check['fix']}" if check["fix"] else ""
        lines.append(f"{MARKS[check['status']]:8} {check['topic']}: {check['found']}{reason}{fix}")
    return "\n".join([*lines, _verdict(summary)])


def _table(summary: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for heading in ("", "topic", "what is used"):
        table.add_column(heading, no_wrap=heading != "what is used", overflow="fold")
    for check in summary["checks"]:
        found = Text(check["found"])
        if check["reason"]:
            found.append(f"\n{check['reason']}", style="dim")
        if check["fix"]:
            found.append(f"\n-> {check['fix']}", style="cyan")
        table.add_row(Text(MARKS[check["status"]], style=STYLES[check["status"]]), Text(check["topic"], style="bold"), found)
    buffer = io.StringIO()
    # A console that writes into text, but with the colours and the width of the terminal that will show it.
    terminal = Console()
    console = Console(file=buffer, width=terminal.width, force_terminal=True, no_color=terminal.no_color)
    console.print(table)
    console.print(Text(_verdict(summary), style=STYLES["ok" if summary["can_train"] else "missing"]))
    return buffer.getvalue().rstrip("\n")
