"""3x3 convolutions with a weight gradient of our own (`csrc/conv`) where it is faster than oneDNN's: bfloat16 with AMX, float32 with AVX2.

The gradient with respect to the filters is one matrix product of the output's gradient with every pixel's neighbourhood. C++ packs
the pictures so that products read the neighbours where they lie, and no neighbourhood is written down.
`benchmarks/train_step.py --preset fast` lists oneDNN's rates beside those of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from pairclip_fast.models.precision import training_format
from pairclip_fast.native import native

ENGINES = {torch.bfloat16: "amx", torch.float32: "avx2"}
"""Instruction set of the native module with which the own gradient wins, by format; the others are there for tests."""
BLOCK = 32
"""Output channels come in multiples of it in bfloat16."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias that leaves the size as it is; parameters as `nn.Conv2d`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, pixels: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        numbers = training_format(pixels)
        if numbers is not None and _own_gradient_wins(pixels, self.weight, numbers):
            result: Tensor = _Convolution.apply(pixels.to(numbers), self.weight)
            return result
        return super().forward(pixels)


def weight_gradient(
    pixels: Float[Tensor, "batch inputs height width"], gradient: Float[Tensor, "batch outputs height width"]
) -> Float[Tensor, "outputs inputs 3 3"]:
    """Of the filters, in float32, from the convolution's input and its output's gradient, both bfloat16 or both float32.

    The same bits in every run and for any number of threads.
    """
    found = torch.empty(gradient.shape[1], pixels.shape[1], 3, 3)
    native().module.conv.weight_gradient(torch.get_num_threads(), channels_last(pixels), channels_last(gradient), found)
    return found


def channels_last(pixels: Float[Tensor, "batch channels height width"]) -> Shaped[Tensor, "batch height width channels"]:
    """For C++: float32 as it is, bfloat16 as the 16-bit integers of its bits."""
    found = pixels.detach().permute(0, 2, 3, 1).contiguous()
    return found.view(torch.int16) if found.dtype == torch.bfloat16 else found


def has_own_gradient(numbers: torch.dtype) -> bool:
    """Whether it wins in that format on this machine."""
    module = native().module
    return module is not None and module.conv.isa() == ENGINES.get(numbers)


def _own_gradient_wins(pixels: Tensor, weight: Tensor, numbers: torch.dtype) -> bool:
    covered = weight.dtype == torch.float32 and (numbers == torch.float32 or weight.shape[0] % BLOCK == 0)
    return covered and weight.requires_grad and pixels.numel() > 0 and has_own_gradient(numbers)


class _Convolution(torch.autograd.Function):
    """The library's convolution, in the format of the pixels, with `weight_gradient`; differentiable once."""

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
