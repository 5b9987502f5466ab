"""What the tests of the fused layers share: numbers, both ways to compute a layer, and how far they are apart."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairclip_fast.models.channel_norm import ChannelNorm
from pairclip_fast.models.fused_norm import normalise, takes
from pairclip_fast.native import native

Norm = TypeVar("Norm", nn.BatchNorm2d, ChannelNorm)
ROUNDING = {torch.bfloat16: 4e-3, torch.float32: 2e-6}
"""Relative error of values and of the pixels' gradient, by format."""
needs_native = pytest.mark.skipif(native().module is None, reason=native().reason)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(shape: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Channels last, with a mean several times the deviation."""
    return (drawn(*shape, seed=seed) + 3).to(dtype).contiguous(memory_format=torch.channels_last)


def with_parameters(norm: Norm) -> Norm:
    """The norm with weights and biases that leave nothing out."""
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(3))
    return norm


def fused(pixels: Tensor, norm: nn.Module, activation: nn.Module, *, pool: bool) -> Tensor:
    """In C++, or the test fails."""
    with torch.autocast("cpu", torch.bfloat16, enabled=pixels.dtype == torch.bfloat16):
        assert takes(pixels, norm=norm, activation=activation, pool=pool)
        return normalise(pixels, norm=norm, activation=activation, pool=pool)


def plain(pixels: Tensor, norm: nn.Module, activation: nn.Module, *, pool: bool) -> Tensor:
    """By torch's modules."""
    result: Tensor = activation(norm(F.max_pool2d(pixels, 2) if pool else pixels))
    return result


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the 2-norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-6))
