"""The machine below torch: Python, processor, memory, disk, and the right to write."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from pairclip_fast.doctor.check import Check
from pairclip_fast.telemetry.machine import CPU_INFO, cpu_flags, cpu_model, cpu_quota, usable_cores

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
COMFORTABLE_MEMORY_GIB = 2.0
"""The default run needs about one."""
COMFORTABLE_DISK_GIB = 1.0
"""Shards of 50,000 raw pairs are 0.4 GiB; checkpoints of the default preset a few MiB each."""
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}
"""Kernel's flag to its usual name; x86 first, then ARM."""


def check_python() -> Check:
    """Interpreter and platform."""
    system = f"{platform.system()} {platform.release()} ({platform.machine()})"
    found = f"{platform.python_implementation()} {platform.python_version()} on {system}"
    if sys.version_info < OLDEST_PYTHON:
        return Check(topic="python", status="missing", found=found, reason="too old", fix="install Python 3.11 or newer")
    return Check(topic="python", status="ok", found=found)


def check_cpu() -> Check:
    """Model and the cores that this process may use."""
    found = f"{cpu_model()}, {usable_cores()} of {os.cpu_count()} cores usable"
    quota = cpu_quota()
    if quota is not None and quota < usable_cores():
        return Check(
            topic="cpu",
            status="fallback",
            found=found,
            reason=f"the container's quota is {quota:.3g} cores",
            fix="raise the quota, or set OMP_NUM_THREADS to it",
        )
    return Check(topic="cpu", status="ok", found=found)


def check_instructions() -> Check:
    """Vector and matrix instructions that training profits from."""
    flags = cpu_flags()
    names = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    absent = [name for flag, name in INSTRUCTIONS.items() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") and flag not in flags]
    found = ", ".join(names) or "none of the known ones"
    if not flags:
        return Check(topic="instructions", status="fallback", found="unknown", reason=f"{CPU_INFO} cannot be read")
    if platform.machine() not in ("x86_64", "AMD64"):
        return Check(topic="instructions", status="ok", found=found)
    reason = f"absent: {', '.join(absent)}" if absent else ""
    return Check(topic="instructions", status="ok" if "avx2" in flags else "fallback", found=found, reason=reason)


def check_memory() -> Check:
    """Main memory, whole and available."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < COMFORTABLE_MEMORY_GIB * GIB:
        return Check(
            topic="memory", status="fallback", found=found, reason="little for training", fix="close other programs or lower --batch-size"
        )
    return Check(topic="memory", status="ok", found=found)


def check_disk(folder: Path) -> Check:
    """Room for data and runs under `folder`, and the right to write there."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check(
            topic="disk", status="missing", found=found, reason="this folder cannot be written to", fix="change to a folder of yours"
        )
    if free < COMFORTABLE_DISK_GIB * GIB:
        return Check(topic="disk", status="fallback", found=found, reason="little for shards and checkpoints", fix="free some space")
    return Check(topic="disk", status="ok", found=f"{found}, writable")
