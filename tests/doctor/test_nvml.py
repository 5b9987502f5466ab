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

from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.nvml import NvmlDevice, NvmlMemory, read_nvml

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
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *m) {
  static int asked = 0;
  m->total = 8ull << 30; m->used = 1ull << 30; m->free = 7ull << 30;
  return ++asked > LOST_AFTER ? 15 : MEMORY;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) { *handle = (void *)16; return strncmp(uuid, "GPU-", 4) ? 6 : 0; }
"""
LOST_AFTER = 1_000_000
"""Questions until the stand-in's GPU falls off the bus."""


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
    defines = [f"-D{name}={value}" for name, value in ({"LOST_AFTER": LOST_AFTER} | values).items()]
    command = ["cc", "-shared", "-fPIC", "-w", *defines, "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True, capture_output=True)


def read_in_process(folder: Path) -> dict[str, Any]:
    return answer_in_process(
        folder,
        "import json, dataclasses; from pairclip_fast.telemetry.nvml import read_nvml; print(json.dumps(dataclasses.asdict(read_nvml())))",
    )


def answer_in_process(folder: Path, program: str) -> Any:
    """What a program with the stand-in library prints, as JSON."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


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


SAMPLING = """
import json
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.nvml import NvmlMemory
events = EventLog(None, console=False)
memory = NvmlMemory("GPU-1", events=events)
readings = [memory.reading() for _ in range(4)]
memory.close()
print(json.dumps([readings, [event["reason"] for event in events.fallbacks]]))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in libnvidia-ml")
def test_the_sampler_on_the_real_bindings_outlives_a_lost_gpu(tmp_path: Path) -> None:
    build(tmp_path, INIT=0, MEMORY=0, LOST_AFTER=2)
    readings, reasons = answer_in_process(tmp_path, SAMPLING)
    assert readings == [{"nvml_used_gib": 1.0}, {"nvml_used_gib": 1.0}, {}, {}]
    assert len(reasons) == 2, "the stand-in does not know processes either; each is told once"
    assert "LibraryMismatch" in reasons[0], "a driver older than the bindings"
    assert "GpuIsLost" in reasons[1]


SAMPLER_CALLS: dict[str, Callable[..., Any]] = {
    "nvmlDeviceGetHandleByUUID": lambda uuid: 1,
    "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
        SimpleNamespace(pid=1, usedGpuMemory=1 << 30),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 << 29),
    ],
}


def test_the_sampler_reads_the_gpu_and_this_process(answers: Callable[..., None]) -> None:
    answers(**SAMPLER_CALLS)
    events = EventLog(None, console=False)
    memory = NvmlMemory("GPU-1", events=events)
    assert memory.reading() == {"nvml_used_gib": 1.5, "nvml_process_gib": 1.5}
    answers(**{**SAMPLER_CALLS, "nvmlDeviceGetComputeRunningProcesses": lambda handle: []})
    assert memory.reading() == {"nvml_used_gib": 1.5}, "in a container with process ids of its own"
    memory.close()
    memory.close()
    assert memory.reading() == {}
    assert events.fallbacks == []


@pytest.mark.parametrize("error", ERRORS)
def test_the_sampler_tells_every_failure_once_and_goes_on(answers: Callable[..., None], error: str) -> None:
    for call in (*SAMPLER_CALLS, "nvmlInit", "nvmlDeviceGetMemoryInfo", "nvmlShutdown"):
        answers(**{**SAMPLER_CALLS, call: raising(error)})
        events = EventLog(None, console=False)
        memory = NvmlMemory("GPU-1", events=events)
        readings = [memory.reading() for _ in range(3)]
        memory.close()
        whole = {"nvml_used_gib": 1.5, "nvml_process_gib": 1.5}
        expected = {"nvmlShutdown": whole, "nvmlDeviceGetComputeRunningProcesses": {"nvml_used_gib": 1.5}}.get(call, {})
        assert readings == [expected] * 3
        assert len(events.fallbacks) == (call != "nvmlShutdown")
        assert all(error.removeprefix("NVMLError_") in event["reason"] for event in events.fallbacks)


def test_the_sampler_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    events = EventLog(None, console=False)
    assert NvmlMemory("GPU-1", events=events).reading() == {}
    assert "nvidia-ml-py" in events.fallbacks[0]["reason"]
