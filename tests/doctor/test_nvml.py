"""NVML fails in many ways; each of them is an absence with a reason, never an exception and never a zero."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pairclip_fast.telemetry.nvml import NvmlDevice, read_nvml

ERRORS = sorted(name for name in dir(pynvml) if name.startswith("NVMLError_"))
ANSWERS: dict[str, Callable[..., Any]] = {
    "nvmlInit": lambda: None,
    "nvmlShutdown": lambda: None,
    "nvmlSystemGetDriverVersion": lambda: "575.57.08",
    "nvmlDeviceGetCount": lambda: 2,
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetName": lambda handle: b"NVIDIA Example" if handle else "NVIDIA Example",
    "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=24 << 30, used=3 << 29, free=0),
    "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 6),
}
WHOLE = NvmlDevice(0, "NVIDIA Example", 24.0, 1.5, (8, 6), {})
STAND_IN = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlInitWithFlags(unsigned flags) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "words of the stand-in"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "575.57.08", size); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)16; return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { strncpy(text, "Stand-in GPU", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *m) { m->total = 8ull << 30; m->used = 1ull << 30; m->free = 7ull << 30; return MEMORY; }
"""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that replaces NVML's calls; those not named give plausible answers."""

    def replace(**calls: Callable[..., Any]) -> None:
        for name, call in {**ANSWERS, **calls}.items():
            monkeypatch.setattr(pynvml, name, call)

    return replace


def raising(name: str) -> Callable[..., Any]:
    def call(*_arguments: Any) -> Any:
        raise getattr(pynvml, name)

    return call


def test_everything_answers(answers: Callable[..., None]) -> None:
    answers()
    reading = read_nvml()
    assert reading.driver_version == "575.57.08"
    assert reading.reason is None
    assert reading.devices[0] == WHOLE
    assert reading.devices[1].name == "NVIDIA Example", "older bindings return bytes"


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_at_every_call_is_an_absence_with_a_reason(answers: Callable[..., None], error: str) -> None:
    for call in ANSWERS:
        answers(**{call: raising(error)})
        reading = read_nvml()
        word = error.removeprefix("NVMLError_")
        if call in ("nvmlInit", "nvmlDeviceGetCount"):
            assert reading.devices == ()
            assert word in (reading.reason or "")
        elif call == "nvmlShutdown":
            assert reading.devices[0] == WHOLE
        elif call == "nvmlSystemGetDriverVersion":
            assert reading.driver_version is None
            assert reading.devices[0] == WHOLE
        else:
            device = reading.devices[0]
            values = [device.name, device.memory_total_gib, device.memory_used_gib, device.compute_capability]
            assert values.count(None) == len(device.absent) >= 1
            assert all(word in reason for reason in device.absent.values())


def test_one_lost_gpu_does_not_hide_the_other(answers: Callable[..., None]) -> None:
    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError_GpuIsLost
        return index

    answers(nvmlDeviceGetHandleByIndex=handle)
    lost, there = read_nvml().devices
    assert set(lost.absent) == {"name", "memory_total_gib", "memory_used_gib", "compute_capability"}
    assert there.name == "NVIDIA Example"


def test_no_gpu_and_no_module(answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    answers(nvmlDeviceGetCount=lambda: 0)
    assert read_nvml().reason == "the driver reports no GPU"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in (read_nvml().reason or "")


def build(folder: Path, **values: int) -> None:
    """The stand-in library, small enough to compile in a test."""
    (folder / "nvml.c").write_text(STAND_IN)
    defines = [f"-D{name}={value}" for name, value in values.items()]
    command = ["cc", "-shared", "-fPIC", "-w", *defines, "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True, capture_output=True)


def read_in_process(folder: Path) -> dict[str, Any]:
    program = (
        "import json, dataclasses; from pairclip_fast.telemetry.nvml import read_nvml; print(json.dumps(dataclasses.asdict(read_nvml())))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, env=environment)
    reading: dict[str, Any] = json.loads(done.stdout)
    return reading


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in libnvidia-ml")
def test_the_real_bindings_against_a_stand_in_library(tmp_path: Path) -> None:
    build(tmp_path, INIT=0, MEMORY=0)
    reading = read_in_process(tmp_path)
    device = reading["devices"][0]
    assert (reading["driver_version"], device["name"], device["memory_total_gib"]) == ("575.57.08", "Stand-in GPU", 8.0)
    assert device["compute_capability"] is None
    assert "FunctionNotFound" in device["absent"]["compute_capability"], "a driver older than the call"
    build(tmp_path, INIT=9, MEMORY=0)
    assert "DriverNotLoaded" in read_in_process(tmp_path)["reason"]
    build(tmp_path, INIT=0, MEMORY=4)
    device = read_in_process(tmp_path)["devices"][0]
    assert device["memory_total_gib"] is None
    assert "NoPermission" in device["absent"]["memory_total_gib"]
