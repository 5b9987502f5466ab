"""Facts about the machine and the code that records and doctor share: processor, cores, versions, commit. No torch here."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that the scheduler gives this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time that the control group allows; None for no limit."""
    try:
        quota, period = CPU_QUOTA.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no control groups (version 2) here: no limit known


def cpu_model() -> str:
    """The processor's name."""
    return _first_core("model name") or platform.processor() or platform.machine() or "unknown"


def cpu_vendor() -> str:
    """The processor's maker as CPUID spells it, "GenuineIntel" or "AuthenticAMD" for instance; empty where the kernel does not say."""
    return _first_core("vendor_id")


def cpu_flags() -> frozenset[str]:
    """The kernel's flags of the first core; empty where it does not say."""
    return frozenset((_first_core("flags") or _first_core("Features")).split())


def _first_core(field: str) -> str:
    """What the kernel says of the first core; empty if nothing."""
    match = re.search(rf"^{field}\s*:\s*(.+)$", _cpu_info(), flags=re.MULTILINE)
    return match.group(1).strip() if match else ""


def _cpu_info() -> str:
    try:
        return CPU_INFO.read_text(errors="replace")
    except OSError:
        return ""


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the named distributions that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of the code, with `-dirty` if it was changed; None if it does not run from a repository of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
