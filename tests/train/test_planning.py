"""What a run says when this processor could train its transformer blocks faster than it will."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pairclip_fast.config import load_preset, overlay
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.events import Event, EventLog
from pairclip_fast.models import tower
from pairclip_fast.native import native
from pairclip_fast.train.planning import blocks_of, parts_on_paper, tell_slower_blocks
from pairclip_fast.train.setup import build_trainee

COVERED, NARROW = {"heads": 1}, {"heads": 2}
"""Of a width of 32: heads of 16 are not covered."""


@pytest.mark.skipif(native().module is None, reason=native().reason)
@pytest.mark.parametrize(
    ("model", "train", "engine", "told"),
    [
        (COVERED, {}, "portable", False),
        (NARROW, {}, "portable", True),
        (NARROW, {}, None, False),
        (NARROW, {"recompute": True}, "portable", False),
    ],
    ids=["covered", "narrow heads", "another processor", "recomputed as asked"],
)
def test_blocks_that_could_be_faster(
    model: dict[str, int],
    train: dict[str, bool],
    engine: str | None,
    told: bool,
    data_template: Path,
    events: EventLog,
    recorded: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tower, "best_engine", {torch.float32: engine}.get)
    shape = {"architecture": "vit", "width": 32, "depth": 1, "mlp_width": 32, "patch_size": 16}
    tables = {"model": shape | model, "train": {"device": "cpu"} | train, "bank": {"rank": 8}}
    config = overlay(load_preset("vit"), tables, where="test")
    parts = parts_on_paper(config, data=data_template, manifest=read_manifest(data_template), run=Path("none"), events=events)
    trainee = build_trainee(parts)
    recorded.clear()
    for compiled in (False, True):  # whoever compiles has chosen
        tell_slower_blocks(parts, blocks_of(parts, trainee, compiled=compiled), compiled=compiled, events=events)
    reason = "the widths of a head (16) and of the MLP (32) are not multiples of 32"
    assert [event["reason"] for event in recorded if event["event"] == "fallback"] == [reason] * told
