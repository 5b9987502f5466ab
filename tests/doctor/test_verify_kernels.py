"""`doctor --verify-kernels`: right numbers pass, wrong ones are named and end with an exit code, and the table says it all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pairclip_fast.doctor import kernels as room
from pairclip_fast.doctor import refuse_if_lacking, render_doctor
from pairclip_fast.doctor.kernels import refuse_wrong_kernels, render_verification, verify_kernels
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.kernels import portable

CPU = torch.device("cpu")
QUIET = EventLog(console=False)
OPERATIONS = ["bank_softmax", "bank_stats", "pair_scores", "bank_topk"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(room.SIZES, "cpu", {"batch": 12, "captions": 90, "dim": 64})
    monkeypatch.setattr(room, "REPEATS", 3)


def test_the_implementation_in_use_is_right_and_timed() -> None:
    verified = verify_kernels(CPU, events=QUIET)
    assert json.loads(json.dumps(verified)) == verified
    assert [(row["operation"], row["dtype"]) for row in verified["rows"]] == [
        (operation, dtype) for dtype in ("float32", "bfloat16") for operation in OPERATIONS
    ]
    for row in verified["rows"]:
        assert row["ok"], row
        assert row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1]
        assert row["torch_ms"] > 0
        assert row["estimate_ms"] is None, "there is no data sheet for a processor"
    refuse_wrong_kernels(verified)


def test_a_known_gpu_gets_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "cpu_model", lambda: "NVIDIA H100 80GB HBM3")
    verified = verify_kernels(CPU, events=QUIET)
    assert all(row["estimate_ms"] > 0 for row in verified["rows"])
    assert "at best (estimate)" in render_verification(verified)


def test_a_wrong_kernel_is_named_and_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
        return PAIRS(emb, bank, indices) + 0.01

    monkeypatch.setattr(portable, "pair_scores", wrong)
    verified = verify_kernels(CPU, events=QUIET)
    assert [row["ok"] for row in verified["rows"][:4]] == [True, True, False, True]
    assert "scores: off by 0.01" in render_verification(verified)
    with pytest.raises(EnvironmentLackingError, match="pair_scores") as caught:
        refuse_wrong_kernels(verified)
    assert caught.value.exit_code == 5
    summary: dict[str, Any] = {"checks": [], "can_train": True, "kernels": verified}
    assert "WRONG" in render_doctor(summary)
    with pytest.raises(EnvironmentLackingError):
        refuse_if_lacking(summary)


PAIRS = portable.pair_scores


def test_the_table_is_readable() -> None:
    lines = render_verification(verify_kernels(CPU, events=QUIET)).splitlines()
    assert len(lines) == 2 + 2 * len(OPERATIONS)
    assert all(len(line) <= 120 for line in lines[1:])
