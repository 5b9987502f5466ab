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
