"""3x3 convolutions with a weight gradient of our own (`csrc/conv`) where the CPU has matrix tiles (AMX) and bfloat16 is trained.

The gradient with respect to the filters is one matrix product of the output's gradient with every pixel's neighbourhood. C++ packs
the pictures so that tiles read the neighbours where they lie, and no neighbourhood is written down. oneDNN's is slow where pictures
are small: `benchmarks/train_step.py --preset fast` lists its rates beside those of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from pairclip_fast.models.precision import trains_in_bfloat16
from pairclip_fast.native import native

ENGINE = "amx"
"""Of the native module, for which the own gradient wins; the others have tiles in software, for tests."""
BLOCK = 32
"""Output channels come in multiples of it."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias that leaves the size as it is; parameters as `nn.Conv2d`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, pixels: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        if _own_gradient_wins(pixels, self.weight):
            result: Tensor = _Convolution.apply(pixels.to(torch.bfloat16), self.weight)
            return result
        return super().forward(pixels)


def weight_gradient(
    pixels: Float[Tensor, "batch inputs height width"], gradient: Float[Tensor, "batch outputs height width"]
) -> Float[Tensor, "outputs inputs 3 3"]:
    """Of the filters, in float32, from the convolution's input and its output's gradient, both bfloat16.

    The same bits in every run and for any number of threads.
    """
    found = torch.empty(gradient.shape[1], pixels.shape[1], 3, 3)
    native().module.conv.weight_gradient(torch.get_num_threads(), channels_last_bits(pixels), channels_last_bits(gradient), found)
    return found


def channels_last_bits(pixels: Float[Tensor, "batch channels height width"]) -> Int16[Tensor, "batch height width channels"]:
    """Bfloat16 as 16-bit integers, for C++."""
    return pixels.detach().permute(0, 2, 3, 1).contiguous().view(torch.int16)


def _own_gradient_wins(pixels: Tensor, weight: Tensor) -> bool:
    module = native().module
    return (
        trains_in_bfloat16(pixels)
        and weight.requires_grad
        and weight.shape[0] % BLOCK == 0
        and pixels.numel() > 0
        and module is not None
        and module.conv.isa() == ENGINE
    )


class _Convolution(torch.autograd.Function):
    """The library's convolution in bfloat16 with `weight_gradient`; differentiable once."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor) -> Tensor:
        rounded = weight.to(pixels.dtype)
        ctx.save_for_backward(pixels, rounded)
        return F.conv2d(pixels, rounded, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        pixels, rounded = ctx.saved_tensors
        found: Tensor | None = None
        if ctx.needs_input_grad[0]:
            found = conv2d_input(pixels.shape, rounded, gradient, padding=1)  # type: ignore[no-untyped-call]
        return found, weight_gradient(pixels, gradient.to(pixels.dtype))
