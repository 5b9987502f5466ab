"""Convolutional stages: 3x3 filters that halve the picture, for the convolutional encoder and for the transformer's stem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.kernels.choice import Implementation
from pairclip_fast.models.blocks import ACTIVATIONS, Activation
from pairclip_fast.models.convolution import Conv3x3, wins_here
from pairclip_fast.models.fused_norm import normalise
from pairclip_fast.models.precision import why_not_ours
from pairclip_fast.native import native

Norm = Callable[[int], nn.Module]
"""From a number of channels to a normalisation over them."""


class Halving(nn.Module):
    """Convolution, maximum of 2x2 pixels, normalisation, activation."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation, norm: Norm) -> None:
        super().__init__()
        self.widen = Conv3x3(inputs, outputs)
        self.norm1 = norm(outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded wider half_height half_width"]:
        return normalise(self.widen(pixels), norm=self.norm1, activation=self.activation, pool=True)


class Stage(Halving):
    """A halving and one more convolution: pooling first lets the second one work on a quarter of the pixels."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation, norm: Norm) -> None:
        super().__init__(inputs, outputs, activation=activation, norm=norm)
        self.refine = Conv3x3(outputs, outputs)
        self.norm2 = norm(outputs)

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded wider half_height half_width"]:
        return normalise(self.refine(super().forward(pixels)), norm=self.norm2, activation=self.activation, pool=False)


class Residual(nn.Module):
    """Convolution, normalisation, activation, added to what went in."""

    def __init__(self, channels: int, *, activation: Activation, norm: Norm) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)
        self.norm = norm(channels)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded channels height width"]:
        return pixels + normalise(self.conv(pixels), norm=self.norm, activation=self.activation, pool=False)


def implementation(encoder: nn.Module, *, device: torch.device, autocast: torch.dtype | None, compiled: bool) -> Implementation:
    """What trains the convolutional stages of `encoder` under `autocast` to a dtype (None for none); the rest is as for `why_not_ours`."""
    if not any(isinstance(part, Halving) for part in encoder.modules()):
        return Implementation("none", "the encoder has none")
    reason = why_not_ours(device=device, compiled=compiled) or why_no_extension()
    if reason is not None:
        return Implementation("torch", reason)
    return Implementation("cpp", parts_of_our_own(autocast or torch.float32))


def why_no_extension() -> str | None:
    """The reason why there is no C++ here; None if there is."""
    found = native()
    return found.reason if found.module is None else None


def parts_of_our_own(numbers: torch.dtype) -> str:
    """What the C++ extension does of a stage on this machine when it trains in that format, in words."""
    name = str(numbers).removeprefix("torch.")
    products = "convolution; " if numbers == torch.float32 else "gradient of the filters; "
    ours = products if wins_here(numbers) else ""
    return f"C++, {native().module.conv.isa()}, {name}: {ours}pooling, normalisation and activation in one"
