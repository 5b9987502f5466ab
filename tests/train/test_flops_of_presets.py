"""The FLOPs that a run prints, against torch's own counter on a real step of every preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pairclip_fast.config import load_preset, overlay, preset_names
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.events import EventLog
from pairclip_fast.models import convolution, tower
from pairclip_fast.telemetry.flops import model_cost
from pairclip_fast.train.budget import noise
from pairclip_fast.train.planning import parts_on_paper
from pairclip_fast.train.setup import Parts, build_trainee

PAIRS = 4
CLOSE = 1e-3


@pytest.fixture(scope="module", params=preset_names())
def parts(request: pytest.FixtureRequest, data_template: Path) -> Parts:
    """A preset on a CPU, with the small bank of the tests' data."""
    config = overlay(load_preset(request.param), {"train": {"device": "cpu", "batch_size": 32}, "bank": {"rank": 8}}, where="test")
    manifest = read_manifest(data_template)
    return parts_on_paper(config, data=data_template, manifest=manifest, run=Path("none"), events=EventLog(None, console=False))


def counted_on_a_real_step(parts: Parts) -> float:
    """Per pair, with real tensors, the real loss and the kernels that this CPU takes."""
    torch.manual_seed(0)
    module = build_trainee(parts).module.train()
    batch = noise(parts, PAIRS)
    with FlopCounterMode(display=False) as counter:
        module(batch.images, batch.caption_ids, batch.valid).backward()
    return counter.get_total_flops() / PAIRS


def test_what_is_printed_is_what_torch_counts(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (convolution, tower):
        monkeypatch.setattr(module, "ENGINES", {})  # torch's counter sees nothing of what is ours
    encoder = build_trainee(parts).module.encoder
    cost = model_cost(encoder, image_shape=parts.image_shape, num_captions=parts.loss_captions)
    counted = counted_on_a_real_step(parts)
    assert cost.training_flops == pytest.approx(counted, rel=CLOSE)
    assert cost.forward_flops != pytest.approx(counted, rel=0.5), "a count without the backward pass would be noticed"
