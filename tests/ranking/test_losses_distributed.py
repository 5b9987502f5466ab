"""Two gloo processes: the losses and gradients of one process with the whole batch; evaluation shares gathered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_two_processes_equal_one(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("gloo_worker.py")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr
    single, *pair = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for kind in ("bank", "infonce"):
        for result in pair:
            assert result[kind] == pytest.approx(single[kind], rel=1e-9, abs=1e-12)
    whole = {"sample_ids": [0, 1, 2, 3, 4], "scores": [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 2, "wins": [False] * 3 + [True] * 2}
    assert [result["gathered"] for result in pair] == [whole] * 2
