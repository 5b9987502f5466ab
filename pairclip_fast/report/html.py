"""The page: everything gathered into one value and one template, with nothing left to fetch.

Names of classes, files and runs come from outside. Autoescape turns them into text, `finalize` strips control
characters from and shortens every string that is not already markup, and a content policy in the page forbids scripts
and any loading, so that even a mistake here would not run or fetch anything. Only drawings and pictures of our own are
marked `safe` in the template.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pairclip_fast.report import classes, costs, figures, gallery, history, results
from pairclip_fast.report.data import Run, number, series
from pairclip_fast.report.words import shown

DEFAULT_TEMPLATE = "the photo on the left is {left} and the photo on the right is {right}"
LONGEST_TEXT = 1_000


def page(run: Run) -> str:
    """The whole HTML document of `run`; the same bytes for the same run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pairclip_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = results.percent
    text = environment.get_template("report.html.j2").render(_context(run))
    return text.encode("ascii", errors="xmlcharrefreplace").decode("ascii")


def _finalize(value: Any) -> Any:
    """Plain strings come out as one harmless line; what the template marks `safe` is no plain string."""
    return shown(value, limit=LONGEST_TEXT) if type(value) is str else value


def _context(run: Run) -> dict[str, Any]:
    evaluations = list(run.evaluations.values())
    primary = evaluations[0] if evaluations else None
    names, template = run.class_names, str(run.manifest.get("template") or DEFAULT_TEMPLATE)
    return {
        "name": run.name,
        "headline": results.headline(run),
        "glance": glance(run),
        "curves": figures.curves(run),
        "time_rows": costs.time_rows(run),
        "time_figure": costs.time_figure(run, figures.positions(run)),
        "advice": costs.advice(run),
        "memory_rows": costs.memory_rows(run),
        "recall": figures.recall_curve(evaluations),
        "splits": [(shown(evaluation.split, limit=40), evaluation.origin) for evaluation in evaluations],
        "metric_rows": results.metric_rows(evaluations),
        "sides": classes.side_results(primary, names) if primary else [],
        "confusions": classes.confusions(primary, names) if primary else [],
        "cards": gallery.cards(primary, names, template) if primary else [],
        "attention": gallery.attention_cards(primary) if primary else [],
        "caption_example": _example(names, template),
        "timeline": history.timeline(run),
        "num_superseded": run.num_superseded,
        "fallbacks": history.fallbacks(run),
        "notes": history.notes(run),
        "problems": run.problems,
        "skipped": _skipped(run),
        "config": history.facts(run.config),
        "data": history.facts({key: value for key, value in run.manifest.items() if key not in ("class_names", "skipped", "notes")}),
        "environment": history.facts({key: value for key, value in run.environment.items() if key != "fallbacks"}),
    }


def glance(run: Run) -> list[tuple[str, str]]:
    """The facts of the run in a few lines; what is not known is left out."""
    plan, model = run.plan, run.config.get("model")
    steps = run.of_kind("step")
    finished = run.finished or {}
    architecture = model.get("architecture") if isinstance(model, dict) else None
    parameters, flops = number(plan.get("parameters")), number(plan.get("flops_per_pair"))
    pflop = next((value for value in (number(event.get("pflop")) for event in reversed(steps)) if value > 0), math.nan)
    rows = [
        ("Preset", run.config.get("preset")),
        ("Data", _data_text(run)),
        ("Text encoder", _text_encoder(run)),
        ("Model", _joined(architecture, f"{parameters:,.0f} parameters" if parameters > 0 else "")),
        ("Cost", _joined(f"{flops / 1e9:.4g} GFLOP per pair" if flops > 0 else "", f"{pflop:.3g} PFLOP so far" if pflop > 0 else "")),
        ("Runs on", _joined(plan.get("device"), plan.get("precision"), _named("loader", plan.get("loader")), plan.get("compile"))),
        ("Kernels", plan.get("kernels")),
        ("Transformer blocks", plan.get("blocks")),
        ("Convolutional stages", plan.get("stages")),
        ("Speed", _speed(steps)),
        ("Time", history.duration(number(finished.get("seconds")))),
        ("Began", _began(run)),
    ]
    return [(label, shown(text, limit=300)) for label, text in rows if text]


def _data_text(run: Run) -> str:
    pairs = [
        f"{number(run.plan.get(f'num_{split}')):,.0f} {split}" for split in ("train", "val") if number(run.plan.get(f"num_{split}")) > 0
    ]
    count = f"{len(run.class_names)} classes" if run.class_names else ""
    source = run.manifest.get("source")
    return _joined(source, count, f"{' + '.join(pairs)} pairs" if pairs else "")


def _text_encoder(run: Run) -> str:
    """The encoder by the bank that travels with the run, and what the run made of its features."""
    table = run.config.get("bank")
    kind = table.get("kind") if isinstance(table, dict) else None
    rank = table.get("rank") if isinstance(table, dict) else None
    model = run.bank.get("model")
    made = f"whitened to rank {rank}" if kind == "whiten" else _named("bank", kind)
    return _joined(run.bank.get("encoder"), model if model != run.bank.get("encoder") else "", made)


def _speed(steps: list[dict[str, Any]]) -> str:
    def middle(key: str) -> float:
        values = series(steps, key)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else math.nan

    rate, tflops, share, wait = (middle(key) for key in ("pairs_per_second", "tflops", "peak_share", "data_wait_fraction"))
    return _joined(
        f"{rate:,.0f} pairs/s" if rate > 0 else "",
        f"{tflops:.3g} TFLOP/s" if tflops > 0 else "",
        f"{results.percent(share)} of peak" if share > 0 else "",
        f"{results.percent(wait)} waiting for data" if wait >= 0 else "",
    )


def _began(run: Run) -> str:
    started = run.of_kind("run_started")
    stamp = history.utc(started[0].get("time")) if started else ""
    attempts = f"{len(started)} attempts" if len(started) > 1 else ""
    return _joined(f"{stamp} UTC" if stamp else "", attempts)


def _example(names: list[str], template: str) -> tuple[str, str]:
    """How the gallery abbreviates a caption, and that caption."""
    left, right = (classes.class_name(names, index) for index in (0, min(1, len(names) - 1)))
    return f"{left} + {right}", gallery.caption_text(template, left, right)


def _skipped(run: Run) -> list[tuple[str, str]]:
    """Bad images that were left out when the data was made."""
    skipped = run.manifest.get("skipped")
    entries = [entry for entry in skipped if isinstance(entry, dict)] if isinstance(skipped, list) else []
    return [(shown(entry.get("where", "")), shown(entry.get("reason", ""), limit=300)) for entry in entries[:50]]


def _named(name: str, value: object) -> str:
    return f"{name} {shown(value)}" if value not in (None, "") else ""


def _joined(*parts: object) -> str:
    return ", ".join(shown(part) for part in parts if part not in (None, ""))
