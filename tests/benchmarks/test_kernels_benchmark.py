"""The benchmark of the kernels runs, writes what it measured, and refuses to time a wrong answer."""

from __future__ import annotations

import json
from pathlib import Path

import kernel_jobs
import kernel_rows
import kernels
import pytest
import torch

from pairclip_fast.kernels import ops


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "ROWS", 70)
    monkeypatch.setattr(kernel_rows, "CAPTIONS", 200)
    monkeypatch.setattr(kernel_rows, "DIM", 32)
    monkeypatch.setattr(kernel_rows, "LOSS_ROWS", 70)
    monkeypatch.setattr(kernel_rows, "CURVE_ROWS", 4)
    monkeypatch.setattr(kernel_rows, "CURVE_CAPTIONS", (200, 400))
    monkeypatch.setattr(kernel_rows, "PEAK_ROUNDS", 1_000)


def test_it_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--json", str(tmp_path / "k.json"), "--repeats", "2", "--threads", "1"]) == 0
    record = json.loads((tmp_path / "k.json").read_bytes())
    assert {row["job"] for row in record["rows"]} == {"ranks", "top 10", "top 100", "loss and gradient"}
    for row in record["rows"]:
        assert row["wall_s_low"] <= row["wall_s"] <= row["wall_s_high"]
    assert all(row["ours float32_faster_by"] == 1 for row in record["rows"] if row["variant"] == "ours float32")
    assert [row["captions"] for row in record["settings"]["curve"]] == [200] * 3 + [400] * 3
    assert record["environment"]["threads"] == 1
    assert (tmp_path / "k.svg").read_text().startswith("<?xml")
    assert "ours bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["bank_stats", "bank_topk", "bank_cross_entropy"])
def test_a_wrong_answer_is_not_timed(operation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = getattr(ops, operation)
    monkeypatch.setattr(kernel_jobs.ops, operation, lambda emb, *rest, **options: right(emb.roll(1, dims=1), *rest, **options))
    assert kernels.main(["--no-curve", "--repeats", "1"]) == 1
    assert "not the answer of float64" in capsys.readouterr().err


def test_without_faiss_its_rows_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert kernel_jobs.faiss_index(torch.zeros(3, 4)) == (None, "not installed")
