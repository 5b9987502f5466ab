"""The doctor: the same answers that training would give, in a fixed form, and an exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairclip_fast.doctor import Check, machine, refuse_if_lacking, render_doctor, run_doctor, training
from pairclip_fast.doctor.check import attempt
from pairclip_fast.errors import ConfigError, EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry import machine as facts
from pairclip_fast.telemetry.nvml import NvmlDevice, NvmlReading

TOPICS = [
    "python", "cpu", "instructions", "memory", "disk", "packages", "torch", "gpu", "--amp", "torch.compile", "loader", "kernels",
    "transformer blocks", "convolutional stages", "text encoder", "extras", "data",
]  # fmt: skip
QUIET = EventLog(console=False)


def by_topic(summary: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["topic"]: check for check in summary["checks"]}


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers on this machine."""
    folder = tmp_path_factory.mktemp("empty")
    answers = run_doctor(events=QUIET, folder=folder)
    assert list(folder.iterdir()) == [], "the doctor changes nothing"
    return answers


def test_the_form_of_the_answers(summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary) == {"format", "version", "can_train", "checks"}
    assert [check["topic"] for check in summary["checks"]] == TOPICS
    for check in summary["checks"]:
        assert set(check) == {"topic", "status", "found", "reason", "fix"}
        assert check["status"] in ("ok", "fallback", "missing")
        assert check["found"].isprintable()
        assert check["status"] == "ok" or check["reason"] or check["fix"], "what is not ok has a reason or a remedy"
    assert summary["can_train"] is True


def test_plain_lines_say_all_of_it(summary: dict[str, Any]) -> None:
    lines = render_doctor(summary).splitlines()
    assert len(lines) == len(TOPICS) + 1
    assert lines[-1].startswith("Training works here")
    refuse_if_lacking(summary)


def test_the_table_for_a_terminal(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns in ("100", "20"):
        monkeypatch.setenv("COLUMNS", columns)
        table = render_doctor(summary)
        assert "\x1b[" in table
        assert all(topic in table for topic in TOPICS) or columns == "20"


def test_importing_the_doctor_is_light() -> None:
    program = (
        "import sys, pairclip_fast.doctor; print([m for m in ('torch', 'numpy', 'transformers', 'pynvml', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_missing_ends_with_exit_code_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    summary = run_doctor(events=QUIET, folder=tmp_path)
    answers = by_topic(summary)
    assert summary["can_train"] is False
    assert answers["torch"]["status"] == "missing"
    assert answers["python"]["status"] == "ok", "one missing room does not silence the others"
    assert "MISSING" in render_doctor(summary)
    with pytest.raises(EnvironmentLackingError, match="torch") as caught:
        refuse_if_lacking(summary)
    assert caught.value.exit_code == 5


def test_the_command_prints_json_and_then_fails(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torn apart')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pairclip_fast.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["can_train"] is False
    assert "torn apart" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so the mode bits alone prove nothing
    assert machine.check_disk(tmp_path).status == "missing"


def test_a_failing_probe_is_an_answer() -> None:
    def broken() -> Check:
        raise OSError("libexample.so: cannot open")

    def refusing() -> Check:
        raise ConfigError("a variable names no folder", got="/nowhere", fix="unset it")

    assert attempt("x", broken).status == "missing"
    assert "libexample.so" in attempt("x", broken).reason
    assert attempt("y", refusing) == Check(
        topic="y", status="missing", found="a variable names no folder", reason="/nowhere", fix="unset it"
    )
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not an answer
        attempt("z", lambda: Check(topic="z", status="ok", found=str(1 // 0)))


def test_a_processor_with_and_without_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(facts, "CPU_INFO", info)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    info.write_text("vendor_id\t: ExampleMaker\nmodel name\t: Example 9000\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n")
    assert facts.cpu_model() == "Example 9000"
    assert facts.cpu_vendor() == "ExampleMaker"
    assert machine.check_instructions().found == "AVX2, AVX-512, AVX-512 BF16, AMX"
    info.write_text("flags : fpu sse2\n")
    assert machine.check_instructions().status == "fallback"
    info.unlink()
    assert machine.check_instructions().found == "unknown"
    assert facts.cpu_vendor() == ""


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("", None), ("1 0", None)])
def test_container_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: float | None) -> None:
    monkeypatch.setattr(facts, "CPU_QUOTA", tmp_path / "cpu.max")
    assert facts.cpu_quota() is None
    (tmp_path / "cpu.max").write_text(text)
    assert facts.cpu_quota() == cores


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert training.check_compiler().status == "fallback"
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "/nowhere/g++" in training.check_compiler().reason


def test_a_gpu_that_only_the_driver_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = NvmlDevice(0, "NVIDIA Example", 24.0, 1.0, (8, 6), {})
    monkeypatch.setattr(training, "read_nvml", lambda: NvmlReading((device,), "575.57.08", None))
    answer = training.check_gpu()
    assert answer.status == "fallback"
    assert "NVIDIA Example (24 GiB, compute capability 8.6); driver 575.57.08" in answer.found
    nameless = NvmlDevice(0, None, None, None, None, {"name": "x"})
    assert training.describe_nvml(nameless) == "a GPU without a name (memory unknown, compute capability unknown)"


def test_an_absent_package_and_absent_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("webdataset", "tensorboard") else find(name))
    assert training.check_packages().found == "no webdataset"
    assert training.check_packages().status == "missing"
    extras = training.check_extras()
    assert extras.status == "fallback"
    assert "tensorboard" in extras.fix
