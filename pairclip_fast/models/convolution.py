"""3x3 convolutions on a CPU, by C++ of our own (`csrc/conv`) where it is faster than oneDNN's.

Float32 with AVX2, or with AMD's AVX-512: all three products by minimal filtering, which needs a quarter of the multiplications.
Bfloat16 with AMX: the weight gradient, one matrix product of the output's gradient with every pixel's neighbourhood, which tiles
read where it lies. The rest is oneDNN's, but the input gradient as one more convolution, with the filters turned about: there
oneDNN's forward pass reaches two to four times the rate of its own input gradient (record `train-step-cpu`;
`benchmarks/train_step.py --preset fast` lists the rates). With AMD's AVX-512 BF16 ours is no faster than oneDNN's, which is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pairclip_fast.models.precision import computing_format
from pairclip_fast.native import native

ENGINES = {torch.bfloat16: ("amx",), torch.float32: ("avx2", "avx512_bf16")}
"""Instruction sets of the native module with which ours wins, by format; the others are there for tests."""
BLOCK = 32
"""Output channels come in multiples of it in bfloat16."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias that leaves the size as it is; parameters as `nn.Conv2d`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, pixels: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        numbers = computing_format(pixels)
        if numbers is None or not _ours_wins(pixels, self.weight, numbers):
            return super().forward(pixels)
        if torch.is_grad_enabled():
            result: Tensor = _Convolution.apply(pixels.to(numbers), self.weight)
            return result
        return convolve(pixels, self.weight)


def convolve(
    pixels: Float[Tensor, "batch inputs height width"], weight: Float[Tensor, "outputs inputs 3 3"]
) -> Float[Tensor, "batch outputs height width"]:
    """The convolution in float32; relative errors are some 1e-6. Channels last."""
    return _convolve(pixels, weight, turned=False)


def input_gradient(
    gradient: Float[Tensor, "batch outputs height width"], weight: Float[Tensor, "outputs inputs 3 3"]
) -> Float[Tensor, "batch inputs height width"]:
    """Of the pixels, from the result's: the convolution with the filters turned about."""
    return _convolve(gradient, weight, turned=True)


def weight_gradient(
    pixels: Float[Tensor, "batch inputs height width"], gradient: Float[Tensor, "batch outputs height width"]
) -> Float[Tensor, "outputs inputs 3 3"]:
    """Of the filters, in float32, from the convolution's input and its output's gradient, both bfloat16 or both float32.

    The same bits in every run and for any number of threads, as of the functions above.
    """
    found = torch.empty(gradient.shape[1], 3, 3, pixels.shape[1])
    native().module.conv.weight_gradient(torch.get_num_threads(), channels_last(pixels), channels_last(gradient), found)
    return found.permute(0, 3, 1, 2)


def turned_about(weight: Float[Tensor, "outputs inputs 3 3"]) -> Float[Tensor, "inputs outputs 3 3"]:
    """The filters with which the convolution of the result's gradient is the gradient of the pixels."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def channels_last(pixels: Float[Tensor, "batch channels height width"]) -> Shaped[Tensor, "batch height width channels"]:
    """For C++: float32 as it is, bfloat16 as the 16-bit integers of its bits."""
    found = pixels.detach().permute(0, 2, 3, 1).contiguous()
    return found.view(torch.int16) if found.dtype == torch.bfloat16 else found


def wins_here(numbers: torch.dtype) -> bool:
    """Whether ours is taken in that format on this machine."""
    module = native().module
    return module is not None and module.conv.isa() in ENGINES.get(numbers, ())


def _ours_wins(pixels: Tensor, weight: Tensor, numbers: torch.dtype) -> bool:
    covered = weight.dtype == torch.float32 and (numbers == torch.float32 or weight.shape[0] % BLOCK == 0)
    has_ours = weight.requires_grad if torch.is_grad_enabled() else numbers == torch.float32
    return covered and has_ours and pixels.numel() > 0 and wins_here(numbers)


def _convolve(pixels: Tensor, weight: Tensor, *, turned: bool) -> Tensor:
    batch, _, height, width = pixels.shape
    found = torch.empty(batch, height, width, weight.shape[1 if turned else 0])
    native().module.conv.convolve(torch.get_num_threads(), channels_last(pixels), channels_last(weight), turned, found)
    return found.permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """In the format of the pixels; differentiable once."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor) -> Tensor:
        rounded = weight.to(pixels.dtype)
        ctx.save_for_backward(pixels, rounded)
        return convolve(pixels, rounded) if rounded.dtype == torch.float32 else F.conv2d(pixels, rounded, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        pixels, rounded = ctx.saved_tensors
        gradient = gradient.to(pixels.dtype)
        found: Tensor | None = None
        if ctx.needs_input_grad[0] and rounded.dtype == torch.float32:
            found = input_gradient(gradient, rounded)
        elif ctx.needs_input_grad[0]:
            found = F.conv2d(gradient, turned_about(rounded), padding=1)
        return found, weight_gradient(pixels, gradient)
