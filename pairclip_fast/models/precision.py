"""When a forward pass is one that bfloat16 code of our own may train."""

from __future__ import annotations

import torch
from torch import Tensor

BF16_SETS = ("amx", "avx512_bf16")
"""Instruction sets of the C++ extension that multiply bfloat16 faster than float32, best first."""


def why_not_ours(*, device: torch.device, autocast: torch.dtype | None, compiled: bool) -> str | None:
    """The reason why no such pass will come; None if it will.

    Args:
        device: Of the parameters.
        autocast: Its dtype, None without autocast.
        compiled: Whether `torch.compile` has the encoder.
    """
    if device.type != "cpu":
        return f"nothing of our own for {device.type}"
    if autocast != torch.bfloat16:
        return "not under bfloat16 autocast"
    return "compiled by torch" if compiled else None


def trains_in_bfloat16(inputs: Tensor) -> bool:
    """Whether `inputs` enter a training pass under bfloat16 autocast on a CPU, and not into `torch.compile`."""
    return (
        inputs.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )
