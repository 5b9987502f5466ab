"""What `pairclip-fast embed` runs: make or reuse the caption bank of a data folder, and say what it allows."""

from __future__ import annotations

import time
from typing import Any

from pairclip_fast.config import load_preset
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.errors import printable
from pairclip_fast.events import EventLog
from pairclip_fast.text.bank import BANK_NAME, bank_for
from pairclip_fast.text.inspect import inspect_bank, inspection_lines
from pairclip_fast.text.options import EmbedOptions


def run_embed(options: EmbedOptions, *, events: EventLog) -> dict[str, Any]:
    """Embed the captions (or reuse the bank that fits) and inspect the bank, raw and whitened.

    Returns:
        JSON-able: path, encoder, model, digest, features, preset, seconds, reused, inspections (raw, whiten).

    Raises:
        DataError: the data folder is damaged.
        EnvironmentLackingError: the encoder asked for is not available.
        StorageError: the bank cannot be written.
    """
    config = load_preset(options.preset)
    manifest = read_manifest(options.data)
    path = options.data / BANK_NAME
    before = path.stat().st_mtime_ns if path.exists() else None
    started = time.perf_counter()
    bank = bank_for(
        options.data,
        manifest,
        text_encoder=options.text_encoder,
        batch_size=options.batch_size,
        projected=options.features == "projected",
        rebuild=True,
        events=events,
    )
    seconds = time.perf_counter() - started
    events.say("inspecting the bank")
    temperature, smoothing = config.loss.temperature, config.loss.label_smoothing
    bank_config = config.bank
    white = bank.whiten(bank_config.rank, strength=bank_config.strength, prompt_ensemble=bank_config.prompt_ensemble)
    banks = (bank, white)
    return {
        "path": str(path),
        "encoder": bank.encoder,
        "model": bank.model,
        "digest": bank.digest,
        "features": bank.features,
        "preset": options.preset,
        "seconds": round(seconds, 3),
        "reused": before == path.stat().st_mtime_ns,
        "inspections": {b.kind: inspect_bank(b, temperature=temperature, label_smoothing=smoothing) for b in banks},
    }


def render_embed(summary: dict[str, Any]) -> str:
    """The summary of `run_embed` in words."""
    how = "reused" if summary["reused"] else f"embedded in {summary['seconds']:.1f} s"
    head = f"{summary['path']}: {summary['encoder']} ({summary['model']}), {summary['features']} features, {how}"
    lines = [head]
    for inspection in summary["inspections"].values():
        lines += ["", *inspection_lines(inspection)]
    return "\n".join(printable(line) for line in lines)
