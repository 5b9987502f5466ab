"""Maximum of 2x2 pixels, normalisation and activation as one function in training on a CPU (`csrc/conv`).

In torch maximum, statistics, normalisation and activation each go through memory, both ways; what each was given is kept, and the
maxima's places in 64 bits. Here it is twice each way for batch normalisation (`channel_norm` has the other kind); kept are the pooled
pixels and a byte per place, and under bfloat16 only the result is rounded. Statistics are those of `nn.BatchNorm2d`, and its
parameters and buffers stay where they are.

Results are the same bits in every run and for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pairclip_fast.models import channel_norm
from pairclip_fast.models.blocks import ACTIVATIONS
from pairclip_fast.models.channel_norm import ChannelNorm, Layer
from pairclip_fast.models.convolution import channels_last
from pairclip_fast.models.precision import training_format
from pairclip_fast.native import native

BLOCK = 32
"""Channels of a batch normalisation come in multiples of it: a cache line."""
LEAST_PIXELS = 2
"""Of a channel: one has no variance (torch raises)."""


def normalise(
    pixels: Float[Tensor, "batch channels height width"], *, norm: nn.Module, activation: nn.Module, pool: bool
) -> Float[Tensor, "batch channels rows columns"]:
    """Pixels, pooled if so wanted, after `norm` and `activation`; as one function where that is covered."""
    if takes(pixels, norm=norm, activation=activation, pool=pool):
        if isinstance(norm, ChannelNorm):
            return channel_norm.run(pixels, norm=norm, layer=Layer(norm.eps, _name(activation), pool))
        assert isinstance(norm, nn.BatchNorm2d)
        return _run(pixels, norm=norm, layer=Layer(norm.eps, _name(activation), pool))
    result: Tensor = activation(norm(F.max_pool2d(pixels, 2) if pool else pixels))
    return result


def takes(pixels: Tensor, *, norm: nn.Module, activation: nn.Module, pool: bool) -> bool:
    """Whether one function does it: pixels that come channels last out of a convolution in training, and nobody looks in between."""
    batch, channels, height, width = pixels.shape
    count = batch * (height // 2) * (width // 2) if pool else batch * height * width
    return (
        training_format(pixels) == pixels.dtype
        and pixels.is_contiguous(memory_format=torch.channels_last)
        and (_covers_batch(norm, channels=channels, count=count) or _covers_channels(norm, channels=channels, count=count))
        and _name(activation) is not None
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (norm, activation))
        and native().module is not None
    )


def _covers_batch(norm: nn.Module, *, channels: int, count: int) -> bool:
    """Batch normalisation in training as `nn.BatchNorm2d` comes by default."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.track_running_stats
        and norm.affine
        and norm.weight.dtype == torch.float32
        and channels % BLOCK == 0
        and count >= LEAST_PIXELS
    )


def _covers_channels(norm: nn.Module, *, channels: int, count: int) -> bool:
    """Normalisation over the channels of each pixel, as it comes by default."""
    return (
        type(norm) is ChannelNorm
        and norm.elementwise_affine
        and norm.bias is not None
        and norm.weight.dtype == torch.float32
        and channels <= channel_norm.MOST_CHANNELS
        and count > 0
    )


def _name(activation: nn.Module) -> Any:
    """Among `ACTIVATIONS`; None for another."""
    return next((name for name, kind in ACTIVATIONS.items() if type(activation) is kind), None)


def _run(pixels: Tensor, *, norm: nn.BatchNorm2d, layer: Layer) -> Tensor:
    result, mean, variance = _Normalise.apply(pixels, norm.weight, norm.bias, layer)
    _track(norm, mean, variance, count=result.numel() // result.shape[1])
    found: Tensor = result
    return found


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, *, count: int) -> None:
    """Move the running statistics as the norm itself does: towards the mean and the unbiased variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    step = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, step)
    norm.running_var.lerp_(variance * (count / (count - 1)), step)


class _Normalise(torch.autograd.Function):
    """From a convolution's result to the activation's, and the statistics. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, height, width = pixels.shape
        shape = (batch, height // 2, width // 2, channels) if layer.pool else (batch, height, width, channels)
        given = channels_last(pixels)
        kept = torch.empty(shape, dtype=given.dtype) if layer.pool else given
        places = torch.empty(shape, dtype=torch.uint8) if layer.pool else None
        result, mean, variance = torch.empty(shape, dtype=given.dtype), torch.empty(channels), torch.empty(channels)
        parameters = [parameter.detach().contiguous() for parameter in (weight, bias)]
        conv, threads = native().module.conv, torch.get_num_threads()
        conv.forward(layer.activation, threads, layer.epsilon, given, *parameters, kept, places, result, mean, variance)
        ctx.save_for_backward(weight, bias, kept if layer.pool else pixels, places, mean, variance)
        ctx.size, ctx.layer, ctx.dtype = pixels.shape, layer, pixels.dtype
        ctx.mark_non_differentiable(mean, variance)
        return result.view(pixels.dtype).permute(0, 3, 1, 2), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, bias, kept, places, mean, variance = ctx.saved_tensors
        batch, channels, height, width = ctx.size
        kept = channels_last(kept) if places is None else kept
        given = channels_last(gradient.to(ctx.dtype))
        found = torch.empty((batch, height, width, channels), dtype=given.dtype)
        parameters = [parameter.detach().contiguous() for parameter in (weight, bias)]
        of_parameters = [torch.empty(channels), torch.empty(channels)]
        conv, threads = native().module.conv, torch.get_num_threads()
        conv.backward(
            ctx.layer.activation, threads, ctx.layer.epsilon, given, *parameters, kept, places, mean, variance, found, *of_parameters
        )
        return found.view(ctx.dtype).permute(0, 3, 1, 2), *of_parameters, None
