"""OpenMP's waiting: chosen for a process that has not loaded torch yet, unless the user chose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pairclip_fast.openmp import CHOICES, SETTINGS

ASK = "from pairclip_fast.openmp import spin_briefly; print(spin_briefly(), "
TELL = ", ".join(f"os.environ.get('{name}')" for name in SETTINGS) + ")"
ASKED = list(SETTINGS.values())


def told(program: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    words = [sys.executable, "-c", f"import os, sys; {program}"]
    return subprocess.run(words, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()


def test_it_is_asked_for() -> None:
    assert told(ASK + TELL) == ["True", *ASKED]


@pytest.mark.parametrize("name", CHOICES)
def test_the_users_own_choice_stays(name: str) -> None:
    assert told(ASK + TELL, **{name: "7"}) == ["False", *("7" if one == name else "None" for one in SETTINGS)]


def test_it_would_not_be_heard_once_torch_is_there() -> None:
    assert told(f"sys.modules['torch'] = sys; {ASK}{TELL}") == ["False", *("None" for _ in SETTINGS)]


def test_the_command_line_asks_before_it_loads_torch() -> None:
    program = f"from pairclip_fast.cli import main; main(['--version']); print('torch' in sys.modules, {TELL}"
    assert told(program)[-3:] == ["False", *ASKED]
