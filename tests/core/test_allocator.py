"""The allocator keeps what is freed: a process that was told takes far fewer page faults, unless the user decided otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pairclip_fast.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
else:
    print(None)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = faults()
for _ in range(10):
    bytearray(64 << 20)
print(faults() - before)
"""


def run(word: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    words = [sys.executable, "-c", PROGRAM, word]
    output = subprocess.run(words, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()
    return output[0], int(output[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_is_kept_and_not_without_being_told() -> None:
    answer, kept = run("keep")
    _, plain = run("leave")
    assert answer == "True"
    assert kept < plain / 10
    assert plain > 1000, "the control must fault, or the test shows nothing"


def test_the_users_own_settings_win() -> None:
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == "False"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_kept_memory_can_be_given_back() -> None:
    program = """
import psutil
from pairclip_fast.allocator import give_back_memory, keep_freed_memory
keep_freed_memory()
bytearray(b"1" * (256 << 20))
kept = psutil.Process().memory_info().rss
give_back_memory()
print((kept - psutil.Process().memory_info().rss) >> 20)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    output = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True).stdout
    assert int(output) > 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_peak_of_memory_in_use_counts_no_holes() -> None:
    """A block that no hole is large enough for: with glibc's own limit the holes before it stay resident."""
    program = """
from contextlib import nullcontext
import sys, psutil
from pairclip_fast.allocator import freed_memory_returned
bytearray(30 << 20)  # from here on glibc serves blocks up to this size from the heap
with freed_memory_returned() if sys.argv[1] == "returned" else nullcontext():
    before = psutil.Process().memory_info().rss
    blocks = [bytearray(b"1") * (4 << 20) for _ in range(40)]
    del blocks[:-1]
    print((psutil.Process().memory_info().rss - before) >> 20)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    held = {
        mode: int(subprocess.run([sys.executable, "-c", program, mode], env=clean, capture_output=True, text=True, check=True).stdout)
        for mode in ("returned", "kept")
    }
    assert held["returned"] <= 8
    assert held["kept"] > 100, "the control must hold what was freed, or the test shows nothing"
