"""Normalisation over channels in C++ against torch's modules in float64: values, gradients, and when it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fused_layers import ROUNDING, drawn, fused, needs_native, off, pictures, plain, with_parameters
from torch import nn

from pairclip_fast.models import fused_norm
from pairclip_fast.models.blocks import ACTIVATIONS, Activation
from pairclip_fast.models.channel_norm import MOST_CHANNELS, ChannelNorm
from pairclip_fast.models.fused_norm import normalise, takes
from pairclip_fast.models.stages import Stage

SHAPES = [(3, 24, 7, 5), (2, 48, 8, 2), (9, 160, 15, 15), (17, 250, 3, 2), (1, 1, 2, 3), (2, MOST_CHANNELS, 2, 2), (5, 33, 4, 6)]
"""Pictures, channels, height, width: channels that fill no row of 32, odd sides, more pictures than a piece, the most channels."""
FAULTS = ("gradient of the mean", "gradient of the variance", "another place of the maximum", "a channel too many")


def channel_norm(channels: int) -> ChannelNorm:
    return with_parameters(ChannelNorm(channels))


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["alone", "pooled"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], *, pool: bool, name: Activation, dtype: torch.dtype) -> None:
    pixels, norm, activation = pictures(shape, seed=0, dtype=dtype).requires_grad_(), channel_norm(shape[1]), ACTIVATIONS[name]()
    exact, inputs = copy.deepcopy(norm).double(), pixels.detach().double().requires_grad_()
    found, wanted = fused(pixels, norm, activation, pool=pool), plain(inputs, exact, activation, pool=pool)
    assert found.dtype == dtype
    assert off(found, wanted) < ROUNDING[dtype]
    gradient = drawn(*wanted.shape, seed=1).to(dtype)
    ours = torch.autograd.grad(found, (pixels, norm.weight, norm.bias), gradient)
    right = torch.autograd.grad(wanted, (inputs, exact.weight, exact.bias), gradient.double())
    assert off(ours[0], right[0]) < ROUNDING[dtype]
    assert ours[0].dtype == dtype
    assert all(off(a, b) < 2e-5 and a.dtype == torch.float32 for a, b in zip(ours[1:], right[1:], strict=True))


@needs_native
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_caught(fault: str) -> None:
    """What the tolerances above tell apart."""
    pixels = pictures((3, 24, 7, 5), seed=0).double().requires_grad_()
    pooled, average = F.max_pool2d(pixels, 2), F.avg_pool2d(pixels, 2)
    norm, gradient = channel_norm(24).double(), drawn(3, 24, 3, 2, seed=1).double()
    kept = average + (pooled - average).detach() if fault == "another place of the maximum" else pooled
    mean = kept.mean(1, keepdim=True)
    count = 25 if fault == "a channel too many" else 24
    variance = (kept - mean).square().sum(1, keepdim=True) / count
    mean = mean.detach() if fault == "gradient of the mean" else mean
    variance = variance.detach() if fault == "gradient of the variance" else variance
    normed = (kept - mean) / (variance + norm.eps).sqrt()
    wrong = F.silu(normed * norm.weight[:, None, None] + norm.bias[:, None, None])
    (found,), (wanted,) = (torch.autograd.grad(way, pixels, gradient, retain_graph=True) for way in (wrong, F.silu(norm(pooled))))
    assert off(found, wanted) > 1e-2


@needs_native
def test_ties_and_nan_go_where_torch_sends_them() -> None:
    pixels = torch.randint(0, 2, (4, 24, 6, 6), generator=torch.Generator().manual_seed(0)).bfloat16()
    pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm, gradient = channel_norm(24), drawn(4, 24, 3, 3, seed=1).bfloat16()
    found, wanted = (torch.autograd.grad(way(pixels, norm, nn.SiLU(), pool=True), pixels, gradient)[0] for way in (fused, plain))
    assert off(found, wanted) < 2e-2
    broken = pixels.detach().clone()
    broken[0, 5, 1, 0] = torch.nan
    result = fused(broken.requires_grad_(), norm, nn.SiLU(), pool=True)
    assert result[0, :, 0, 0].isnan().all()
    assert int(result.isnan().sum()) == 24, "one pixel's channels"


@needs_native
def test_same_bits_for_any_number_of_threads() -> None:
    pixels, threads = pictures((19, 40, 9, 9), seed=0).requires_grad_(), torch.get_num_threads()
    gradient, runs = drawn(19, 40, 4, 4, seed=1).bfloat16(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            norm = channel_norm(40)
            result = fused(pixels, norm, nn.SiLU(), pool=True)
            runs.append([result, *torch.autograd.grad(result, (pixels, norm.weight, norm.bias), gradient)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_native
def test_in_a_stage_it_is_no_worse_than_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss gradients of all parameters, against float64's."""
    pixels = drawn(16, 24, 10, 10, seed=0).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    start, weights = Stage(24, 48, activation="silu", norm=ChannelNorm).to(memory_format=torch.channels_last), drawn(16, 48, 5, 5, seed=1)
    found = []
    for way in ("exact", "ours", "autocast"):
        stage = copy.deepcopy(start).double() if way == "exact" else copy.deepcopy(start)
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "autocast":
                patch.setattr(fused_norm, "takes", lambda *_args, **_named: False)
            result = stage(pixels.to(next(stage.parameters()).dtype))
        assert (type(result.grad_fn).__name__ == "_ChannelNormaliseBackward") == (way == "ours")
        gradients = torch.autograd.grad((result.double() * weights).sum(), list(stage.parameters()))
        found.append(torch.cat([one.double().flatten() for one in gradients]))
    exact, ours, autocast = found
    assert off(ours, exact) < 1.1 * off(autocast, exact)


@pytest.mark.parametrize(
    "reason", ["bfloat16 alone", "float64", "no gradient", "many channels", "planes", "no bias", "hook", "another norm"]
)
def test_else_torch_does_it(reason: str) -> None:
    channels = MOST_CHANNELS + 1 if reason == "many channels" else 32
    pixels = pictures((2, channels, 4, 4), seed=0)
    pixels = pixels.contiguous() if reason == "planes" else pixels.double() if reason == "float64" else pixels
    norm = ChannelNorm(channels, bias=reason != "no bias").to(torch.float64 if reason == "float64" else torch.float32)
    if reason == "hook":
        norm.register_forward_hook(lambda *_: None)
    other: nn.Module = nn.GroupNorm(2, channels) if reason == "another norm" else norm
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=reason not in ("bfloat16 alone", "float64")),
        torch.set_grad_enabled(reason != "no gradient"),
    ):
        assert not takes(pixels, norm=other, activation=nn.SiLU(), pool=True)
        wanted = plain(pixels, copy.deepcopy(other), nn.SiLU(), pool=True)
        assert torch.equal(normalise(pixels, norm=other, activation=nn.SiLU(), pool=True), wanted)
