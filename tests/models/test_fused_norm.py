"""The fused layer against torch's modules and float64: values, gradients, running statistics, and when it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fused_layers import ROUNDING, drawn, fused, needs_native, off, pictures, plain, with_parameters
from torch import nn

from pairclip_fast.models import convolution, fused_norm, stages
from pairclip_fast.models.blocks import ACTIVATIONS, Activation
from pairclip_fast.models.fused_norm import normalise, takes
from pairclip_fast.models.stages import Residual, Stage
from pairclip_fast.native import native

SHAPES = [(3, 32, 7, 5), (2, 96, 8, 2), (9, 64, 15, 15), (17, 288, 3, 2), (2, 32, 2, 3)]
"""Pictures, channels, height, width: odd sides, more pictures than a piece, more channels than go at a time."""
FAULTS = ("gradient of the mean", "gradient of the variance", "another place of the maximum", "biased running variance")


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return with_parameters(nn.BatchNorm2d(channels))


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["alone", "pooled"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_gradients_and_statistics(shape: tuple[int, ...], *, pool: bool, name: Activation, dtype: torch.dtype) -> None:
    pixels, norm, activation = pictures(shape, seed=0, dtype=dtype).requires_grad_(), batch_norm(shape[1]), ACTIVATIONS[name]()
    exact, inputs = copy.deepcopy(norm).double(), pixels.detach().double().requires_grad_()
    library, copied = copy.deepcopy(norm), pixels.detach().float().requires_grad_()
    found, wanted = fused(pixels, norm, activation, pool=pool), plain(inputs, exact, activation, pool=pool)
    assert found.dtype == dtype
    assert off(found, wanted) < ROUNDING[dtype]
    gradient = drawn(*wanted.shape, seed=1).to(dtype)
    ours = torch.autograd.grad(found, (pixels, norm.weight, norm.bias), gradient)
    right = torch.autograd.grad(wanted, (inputs, exact.weight, exact.bias), gradient.double())
    torchs = torch.autograd.grad(plain(copied, library, activation, pool=pool), copied, gradient.float())
    assert off(ours[0], right[0]) < max(ROUNDING[dtype], 1.5 * off(torchs[0], right[0])), "of two pixels little but rounding is left"
    assert ours[0].dtype == dtype
    assert all(off(a, b) < 2e-5 and a.dtype == torch.float32 for a, b in zip(ours[1:], right[1:], strict=True))
    for own, other in zip(norm.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_caught(fault: str) -> None:
    """What the tolerances above tell apart."""
    pixels = pictures((3, 32, 7, 5), seed=0).double().requires_grad_()
    pooled = F.max_pool2d(pixels, 2)
    norm, gradient = batch_norm(32).double(), drawn(3, 32, 3, 2, seed=1).double()
    variance, mean = torch.var_mean(pooled, (0, 2, 3), correction=0, keepdim=True)
    if fault == "biased running variance":
        norm(pooled)
        assert not torch.allclose(norm.running_var, 0.9 + 0.1 * variance.flatten(), rtol=1e-5, atol=1e-5)
        return
    mean = mean.detach() if fault == "gradient of the mean" else mean
    variance = variance.detach() if fault == "gradient of the variance" else variance
    kept = F.avg_pool2d(pixels, 2) + (pooled - F.avg_pool2d(pixels, 2)).detach() if fault.startswith("another") else pooled
    normed = (kept - mean) / (variance + norm.eps).sqrt()
    wrong = F.silu(normed * norm.weight[:, None, None] + norm.bias[:, None, None])
    found, wanted = (
        torch.autograd.grad(wrong, pixels, gradient),
        torch.autograd.grad(F.silu(norm(F.max_pool2d(pixels, 2))), pixels, gradient),
    )
    assert off(found[0], wanted[0]) > 1e-2


@needs_native
def test_ties_and_nan_go_where_torch_sends_them() -> None:
    pixels = torch.randint(0, 2, (4, 32, 6, 6), generator=torch.Generator().manual_seed(0)).bfloat16()
    pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm, gradient = batch_norm(32), drawn(4, 32, 3, 3, seed=1).bfloat16()
    found, wanted = (torch.autograd.grad(way(pixels, norm, nn.SiLU(), pool=True), pixels, gradient)[0] for way in (fused, plain))
    assert off(found, wanted) < 2e-2
    broken = pixels.detach().clone()
    broken[0, 5, 1, 0] = torch.nan
    result = fused(broken.requires_grad_(), norm, nn.SiLU(), pool=True)
    assert result[:, 5].isnan().all()
    assert not result[:, :5].isnan().any()
    assert norm.running_var is not None
    assert norm.running_var.isnan().nonzero().flatten().tolist() == [5]


@needs_native
def test_same_bits_for_any_number_of_threads() -> None:
    pixels, threads = pictures((19, 64, 9, 9), seed=0).requires_grad_(), torch.get_num_threads()
    gradient, runs = drawn(19, 64, 4, 4, seed=1).bfloat16(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            norm = batch_norm(64)
            result = fused(pixels, norm, nn.SiLU(), pool=True)
            runs.append([result, *torch.autograd.grad(result, (pixels, norm.weight, norm.bias), gradient), *norm.buffers()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_native
@pytest.mark.parametrize("residuals", [0, 1])
def test_in_a_stage_it_is_no_worse_than_autocast(residuals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss gradients of all parameters, against float64's; and the norms' buffers."""
    pixels = drawn(16, 32, 10, 10, seed=0).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    start = nn.Sequential(Stage(32, 64, activation="silu", norm=nn.BatchNorm2d))
    start.extend(Residual(64, activation="silu", norm=nn.BatchNorm2d) for _ in range(residuals))
    start, weights = start.to(memory_format=torch.channels_last), drawn(16, 64, 5, 5, seed=1)
    found = []
    for way in ("exact", "ours", "autocast"):
        stage = copy.deepcopy(start).double() if way == "exact" else copy.deepcopy(start)
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "autocast":
                patch.setattr(fused_norm, "takes", lambda *_args, **_named: False)
            result = stage(pixels.to(next(stage.parameters()).dtype))
        last = result.grad_fn.next_functions[1][0] if residuals else result.grad_fn
        assert (type(last).__name__ == "_NormaliseBackward") == (way == "ours")
        gradients = torch.autograd.grad((result.double() * weights).sum(), list(stage.parameters()))
        found.append(torch.cat([one.double().flatten() for one in gradients]))
    exact, ours, autocast = found
    assert off(ours, exact) < 1.1 * off(autocast, exact)


@pytest.mark.parametrize(
    "reason", ["bfloat16 alone", "float64", "no gradient", "odd channels", "planes", "evaluation", "hook", "untracked", "one pixel"]
)
def test_else_torch_does_it(reason: str) -> None:
    channels = 33 if reason == "odd channels" else 32
    pixels = pictures((1, channels, 2, 2) if reason == "one pixel" else (2, channels, 4, 4), seed=0)
    pixels = pixels.contiguous() if reason == "planes" else pixels.double() if reason == "float64" else pixels
    norm = nn.BatchNorm2d(channels, track_running_stats=reason != "untracked").train(reason != "evaluation")
    norm = norm.double() if reason == "float64" else norm
    if reason == "hook":
        norm.register_forward_hook(lambda *_: None)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=reason not in ("bfloat16 alone", "float64")),
        torch.set_grad_enabled(reason != "no gradient"),
    ):
        assert not takes(pixels, norm=norm, activation=nn.SiLU(), pool=True)
        if reason != "one pixel":
            wanted = plain(pixels, copy.deepcopy(norm), nn.SiLU(), pool=True)
            assert torch.equal(normalise(pixels, norm=norm, activation=nn.SiLU(), pool=True), wanted)


@needs_native
def test_a_cumulative_average() -> None:
    norm, other = nn.BatchNorm2d(32, momentum=None), nn.BatchNorm2d(32, momentum=None)
    for seed in range(3):
        pixels = pictures((2, 32, 4, 4), seed=seed)
        fused(pixels, norm, nn.SiLU(), pool=False)
        other(pixels.float())
    for own, torchs in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-5, atol=1e-5)


@needs_native
def test_the_choice_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    batch_normed = Stage(3, 32, activation="silu", norm=nn.BatchNorm2d)

    def chosen(encoder: nn.Module = batch_normed, device: torch.device = cpu, dtype: torch.dtype | None = bf16, **how: bool) -> str:
        found = stages.implementation(encoder, device=device, autocast=dtype, **({"compiled": False} | how))
        return f"{found.name} ({found.reason})"

    isa = native().module.conv.isa()
    assert {bf16: ("amx",), torch.float32: ("avx2", "avx512_bf16")} == convolution.ENGINES
    monkeypatch.setattr(convolution, "ENGINES", {bf16: (isa,)})
    assert chosen() == f"cpp (C++, {isa}, bfloat16: gradient of the filters; pooling, normalisation and activation in one)"
    assert chosen(dtype=None) == f"cpp (C++, {isa}, float32: pooling, normalisation and activation in one)"
    monkeypatch.setattr(convolution, "ENGINES", {torch.float32: (isa,)})
    assert chosen(dtype=None) == f"cpp (C++, {isa}, float32: convolution; pooling, normalisation and activation in one)"
    assert chosen(nn.Linear(1, 1)) == "none (the encoder has none)"
    assert chosen(device=torch.device("cuda")) == "torch (nothing of our own for cuda)"
    assert chosen(compiled=True) == "torch (compiled by torch)"
    monkeypatch.setattr(stages, "native", lambda: native()._replace(module=None, reason="PAIRCLIP_NATIVE=off"))
    assert chosen() == "torch (PAIRCLIP_NATIVE=off)"
