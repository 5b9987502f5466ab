"""The resident loader without a GPU: its kernel in the interpreter and compiled ahead of time, and the way back to torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends import resident
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.events import EventLog

FILE = Path(__file__).parent / "interpreted" / "resident.py"
FULL = AugmentConfig(rotate_degrees=25.0, brightness=0.4, contrast=0.3, saturation=0.6, flip_probability=0.3, shift_pixels=4, cutout_size=7)
CONFIGS = {"everything": FULL, "no rotation": dataclasses.replace(FULL, rotate_degrees=0.0, border="reflect")}
NIGHTLY = os.environ.get("PAIRCLIP_HYPOTHESIS") == "nightly"
CAPABILITIES = (80, 86, 89, 90, 100, 120) if NIGHTLY else (90,)


@pytest.mark.timeout(180)  # 17 s of CPU time, on machines that others use too
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(FILE)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-1_000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_compiles_ahead_of_time(capability: int, name: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pairclip_fast.data.backends import triton_tiles

    kernel = triton_tiles.augment_kernel
    constants = triton_tiles.compile_time(CONFIGS[name], partner=False, tiles=2, height=32, width=32)
    types = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(constants, "constexpr")
    types |= {"tiles": "*u8", "sources": "*i64", "samples": "*i64", "images": "*fp32", "epoch": "i32", "seed": "i64"}
    source = ASTSource(kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_tiles.WARPS})
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    # Sine and cosine keep a few bytes in memory for arguments far beyond half a turn; nothing else does.
    assert (".local" in compiled.asm["ptx"]) == (CONFIGS[name].rotate_degrees > 0.0)


def test_without_a_gpu_there_is_one_event_and_torch(folders: dict[str, Path], events: EventLog) -> None:
    with ShardReader(folders["raw"], "train") as reader:
        executor = resident.resident_executor(reader, augment=FULL, device=torch.device("cpu"), events=events)
    assert executor.name == "reference"
    (event,) = events.fallbacks
    assert (event["what"], event["chosen"]) == ("resident loader", "torch operations")
    assert event["reason"]
