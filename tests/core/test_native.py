"""The extension is found, or its absence is told with a reason."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pairclip_fast.errors import ConfigError
from pairclip_fast.models.precision import BF16_SETS
from pairclip_fast.native import native
from pairclip_fast.train.precision import cpu_bf16_feature

ISA = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def isa_in_a_new_process(**environment: str) -> str:
    code = "from pairclip_fast.native import native; found = native(); print(found.module.isa() if found.module else found.reason)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_extension_is_there_or_says_why() -> None:
    found = native()
    if found.module is None:
        assert "C++" in found.reason or "PAIRCLIP_NATIVE" in found.reason
    else:
        assert found.module.isa() in ISA


def test_it_can_be_switched_off() -> None:
    assert isa_in_a_new_process(PAIRCLIP_NATIVE="off") == "PAIRCLIP_NATIVE=off"


def test_the_instruction_set_can_be_lowered_but_never_raised() -> None:
    if native().module is None:
        pytest.skip(native().reason)
    best = native().module.isa()
    assert isa_in_a_new_process(PAIRCLIP_ISA="portable") == "portable"
    assert isa_in_a_new_process(PAIRCLIP_ISA="amx") == best


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRCLIP_ISA", "avx3")
    with pytest.raises(ConfigError, match="unknown instruction set"):
        native.__wrapped__()


def test_the_extension_and_amp_agree_on_where_bfloat16_pays() -> None:
    if native().module is None or "PAIRCLIP_ISA" in os.environ:
        pytest.skip("no extension, or its instruction set is lowered")
    assert (native().module.isa() in BF16_SETS) == (cpu_bf16_feature() is not None)
