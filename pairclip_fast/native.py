"""The C++ extension, if this installation has it: the one importer of `pairclip_fast._native`.

The package installs without a compiler; then every user of the extension takes its Python twin and tells the reason given
here. `PAIRCLIP_NATIVE=off` does as if it were not there; `PAIRCLIP_ISA` lowers the instruction set that it uses.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any, NamedTuple

from pairclip_fast.errors import ConfigError

VARIABLE = "PAIRCLIP_NATIVE"
ISA_VARIABLE = "PAIRCLIP_ISA"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""As `csrc/core/cpu.cpp` names them."""


class Native(NamedTuple):
    """The extension module, or None and the reason."""

    module: Any
    reason: str


@functools.cache
def native() -> Native:
    """Import the extension once.

    Raises:
        ConfigError: `PAIRCLIP_ISA` names no instruction set.
    """
    wanted = os.environ.get(ISA_VARIABLE, ISAS[0])
    if wanted not in ISAS:
        raise ConfigError("unknown instruction set", where=ISA_VARIABLE, expected=", ".join(ISAS), got=wanted)
    if os.environ.get(VARIABLE) == "off":
        return Native(None, f"{VARIABLE}=off")
    try:
        module = importlib.import_module("pairclip_fast._native")
    except ModuleNotFoundError:
        return Native(None, "the C++ extension was not built (install again where there is a C++20 compiler)")
    except ImportError as error:
        return Native(None, f"the C++ extension cannot be loaded: {error}")
    return Native(module, f"C++ extension, {module.isa()}")
