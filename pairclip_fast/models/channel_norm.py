"""LayerNorm over the channels of each pixel; in training with pooling before it and the activation after it as one function.

All that a result needs is in its own pixel, so in C++ (`csrc/conv`) the three are one pass over memory each way: kept are the pooled
pixels and a byte per place, and under bfloat16 only the result is rounded. `fused_norm` says when; results are the same bits in
every run and for any number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pairclip_fast.models.convolution import channels_last
from pairclip_fast.native import native

ROW = 32
"""Channels that are computed together; what is kept of a pixel is padded to a multiple of it."""
MOST_CHANNELS = 256
"""Of a pixel, in C++."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel. As fast as batch norm here, and a picture's features depend on no other
    picture: micro-batches, processes and evaluation all compute the same function.
    """

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded channels height width"]:
        return super().forward(pixels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Layer(NamedTuple):
    """What a fused layer is beside its parameters."""

    epsilon: float
    activation: str
    pool: bool


def run(
    pixels: Float[Tensor, "batch channels height width"], *, norm: ChannelNorm, layer: Layer
) -> Float[Tensor, "batch channels rows columns"]:
    """The activation's result, in the format of the pixels, for pixels that `fused_norm.takes` takes."""
    result: Tensor = _ChannelNormalise.apply(pixels, norm.weight, norm.bias, layer)
    return result


class _ChannelNormalise(torch.autograd.Function):
    """From a convolution's result to the activation's. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor, layer: Layer) -> Tensor:
        batch, channels, height, width = pixels.shape
        rows, columns = (height // 2, width // 2) if layer.pool else (height, width)
        given, padded = channels_last(pixels), (batch, rows, columns, -(-channels // ROW) * ROW)
        kept = torch.empty(padded, dtype=given.dtype) if layer.pool else given
        places = torch.empty(padded, dtype=torch.uint8) if layer.pool else None
        result = torch.empty((batch, rows, columns, channels), dtype=given.dtype)
        parameters = [parameter.detach().contiguous() for parameter in (weight, bias)]
        threads = torch.get_num_threads()
        native().module.conv.channel_forward(layer.activation, threads, layer.epsilon, given, *parameters, kept, places, result)
        ctx.save_for_backward(weight, bias, kept if layer.pool else pixels, places)
        ctx.size, ctx.layer, ctx.dtype = pixels.shape, layer, pixels.dtype
        return result.view(pixels.dtype).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, kept, places = ctx.saved_tensors
        batch, channels, height, width = ctx.size
        kept = channels_last(kept) if places is None else kept
        given, threads, layer = channels_last(gradient.to(ctx.dtype)), torch.get_num_threads(), ctx.layer
        found = torch.empty((batch, height, width, channels), dtype=given.dtype)
        parameters = [parameter.detach().contiguous() for parameter in (weight, bias)]
        of_parameters = [torch.empty(channels), torch.empty(channels)]
        native().module.conv.channel_backward(
            layer.activation, threads, layer.epsilon, given, *parameters, kept, places, found, *of_parameters
        )
        return found.view(ctx.dtype).permute(0, 3, 1, 2), *of_parameters, None
