"""3x3 convolutions with a weight gradient of our own where the CPU library's is slow: bfloat16 on small pictures.

The gradient with respect to the filters is one matrix product of the output's gradient with every pixel's neighbourhood
(im2col; Chellapilla et al. 2006). Writing the neighbourhoods down costs nine times the pictures, so a few pictures at a time; on pictures
of a few pixels and hundreds of channels that is nothing beside the product. Against oneDNN's, with 256 channels on a CPU with
AMX: 3x3 pixels 4.4 times, 7x7 pixels 1.6 times as fast; at 15x15 with fewer channels no faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from pairclip_fast.models.precision import trains_in_bfloat16

MOST_PIXELS = 64
"""Of a picture, for which the own gradient wins."""
LEAST_CHANNELS = 64
"""Input channels, likewise."""
NEIGHBOURHOODS = 2**22
"""Numbers written down at a time: 8 MB."""


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
    """Of the filters, in float32 (summed so over the pieces), from the convolution's input and its output's gradient."""
    inputs, outputs = pixels.shape[1], gradient.shape[1]
    framed = F.pad(pixels.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    picture, row, pixel, _ = framed.stride()
    neighbours = framed.as_strided((*gradient.shape[::2], gradient.shape[3], 3, 3 * inputs), (picture, row, pixel, row, 1))
    count = max(1, NEIGHBOURHOODS // neighbours[0].numel())
    total = torch.zeros(outputs, 9 * inputs)
    for piece, part in zip(torch.split(neighbours, count), torch.split(gradient, count), strict=True):
        total += rearrange(part, "b o h w -> o (b h w)") @ rearrange(piece, "b h w p q -> (b h w) (p q)")
    return rearrange(total, "o (p q i) -> o i p q", p=3, q=3)


def _own_gradient_wins(pixels: Tensor, weight: Tensor) -> bool:
    return (
        trains_in_bfloat16(pixels)
        and weight.requires_grad
        and pixels.shape[2] * pixels.shape[3] <= MOST_PIXELS
        and pixels.shape[1] >= LEAST_CHANNELS
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
        return found, weight_gradient(pixels, gradient)
