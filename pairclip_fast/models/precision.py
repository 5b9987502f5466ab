"""When a forward pass is one for code of our own, and in which format."""

from __future__ import annotations

import torch
from torch import Tensor

BF16_SETS = ("amx", "avx512_bf16")
"""Instruction sets of the C++ extension that multiply bfloat16 faster than float32, best first."""


def why_not_ours(*, device: torch.device, compiled: bool) -> str | None:
    """The reason why no such pass will come; None if it will.

    Args:
        device: Of the parameters.
        compiled: Whether `torch.compile` has the encoder.
    """
    if device.type != "cpu":
        return f"nothing of our own for {device.type}"
    return "compiled by torch" if compiled else None


def training_format(inputs: Tensor) -> torch.dtype | None:
    """What products are computed in if `inputs` enter a training pass on a CPU, and not into `torch.compile`; None if they do not."""
    return computing_format(inputs) if torch.is_grad_enabled() else None


def computing_format(inputs: Tensor) -> torch.dtype | None:
    """The same for any pass: bfloat16 under its autocast; float32 where the inputs have it and nothing is cast; None for anything else."""
    if inputs.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    cast = torch.is_autocast_enabled("cpu")
    found, wanted = (torch.get_autocast_dtype("cpu"), torch.bfloat16) if cast else (inputs.dtype, torch.float32)
    return found if found == wanted else None
