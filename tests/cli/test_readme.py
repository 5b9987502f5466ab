"""The README is run, not believed: its Python works as printed, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pairclip_fast.cli import COMMANDS
from pairclip_fast.config import load_preset, preset_names
from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.sources import shapes
from pairclip_fast.events import EventLog
from pairclip_fast.models.build import build_model
from pairclip_fast.telemetry.flops import model_cost

CLIP_DIM = 512
"""Width of CLIP ViT-B's text features, which the raw banks have."""
README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 400)
    monkeypatch.chdir(tmp_path)
    run_shard(ShardOptions(source="shapes", num_pairs=520), EventLog(console=False))
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - that is the test
    assert capsys.readouterr().out == "torch.Size([256, 3, 32, 64]) torch.Size([256])\n" * 2


def test_commands_named_exist() -> None:
    named = set(re.findall(r"pairclip-fast ([a-z]+)", " ".join(blocks("[a-z]*"))))
    assert named <= set(COMMANDS)
    assert {"shard", "train"} <= named


@pytest.mark.parametrize("name", preset_names())
def test_the_table_gives_each_presets_real_size(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \|[^|]*\| ([0-9,]+) \| ([0-9.]+) \|", README, flags=re.MULTILINE)
    config = load_preset(name)
    dim = config.bank.rank if config.bank.kind == "whiten" else CLIP_DIM
    model = build_model(config.model, tiles=2, tile_size=(32, 32), dim=dim)
    cost = model_cost(model, image_shape=(3, 32, 64), num_captions=10_000)
    flops = sum(
        share * model_cost(model, image_shape=(3, size, 2 * size), num_captions=10_000).training_flops
        for size, share in config.train.progressive or ((32, 1.0),)
    )
    assert row == (f"{cost.parameters - cost.head_parameters:,}", f"{flops / 1e9:.3f}")
