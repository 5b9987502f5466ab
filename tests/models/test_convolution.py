"""Our convolution and its gradients against the definition in float64, and when they are taken."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.models import convolution
from pairclip_fast.models.convolution import Conv3x3, convolve, input_gradient, weight_gradient
from pairclip_fast.native import native

SHAPES = [(1, 64, 32, 1, 1), (3, 70, 64, 3, 3), (5, 24, 96, 7, 5), (9, 80, 32, 4, 8), (2, 32, 64, 33, 34), (40, 8, 32, 6, 5)]
"""Pictures, input and output channels, height, width: odd ones, more pixels than are packed at a time, more pictures than pieces."""
FORMATS = {torch.bfloat16: SHAPES, torch.float32: [*SHAPES, (5, 3, 1, 9, 7), (3, 17, 13, 5, 5), (1, 9, 30, 2, 450)]}
"""In float32 output channels need not come in blocks; a row longer than what is packed at a time."""
WINOGRAD = 5e-6
"""Relative error of minimal filtering in float32."""
needs_native = pytest.mark.skipif(native().module is None, reason=native().reason)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers that bfloat16 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def exact(pixels: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of pixels and weight in float64."""
    pixels, weight = pixels.double().requires_grad_(), weight.double().requires_grad_()
    return torch.autograd.grad(F.conv2d(pixels, weight, padding=1), (pixels, weight), gradient.double())


def check(pixels: Tensor, gradient: Tensor, found: Tensor) -> None:
    weight = torch.zeros(gradient.shape[1], pixels.shape[1], 3, 3)
    torch.testing.assert_close(found.double(), exact(pixels, weight, gradient)[1], rtol=1e-4, atol=1e-3)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_native
@pytest.mark.parametrize(("numbers", "shape"), [(numbers, shape) for numbers, shapes in FORMATS.items() for shape in shapes], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def test_weight_gradient(numbers: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    batch, inputs, outputs, height, width = shape
    pixels = drawn(batch, inputs, height, width, seed=0, dtype=numbers).contiguous(memory_format=layout)
    gradient = drawn(batch, outputs, height, width, seed=1, dtype=numbers).contiguous(memory_format=layout)
    check(pixels, gradient, weight_gradient(pixels, gradient))


@needs_native
@pytest.mark.parametrize("shape", FORMATS[torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels last"])
def test_convolution_and_input_gradient(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    batch, inputs, outputs, height, width = shape
    pixels, gradient, weight = (
        torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)
        for seed, sizes in enumerate([(batch, inputs, height, width), (batch, outputs, height, width), (outputs, inputs, 3, 3)])
    )
    found = convolve(pixels, weight)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert off(found, F.conv2d(pixels.double(), weight.double(), padding=1)) < WINOGRAD
    assert off(input_gradient(gradient, weight), exact(pixels, weight, gradient)[0]) < WINOGRAD


@needs_native
@pytest.mark.parametrize("fault", ["turned filters", "one tap missing", "no border", "tiles of another picture"])
def test_a_wrong_convolution_is_caught(fault: str) -> None:
    pixels, weight = drawn(3, 24, 9, 7, seed=0, dtype=torch.float32), drawn(16, 24, 3, 3, seed=1, dtype=torch.float32)
    wanted = F.conv2d(pixels.double(), weight.double(), padding=1)
    if fault == "turned filters":
        weight = weight.flip(2, 3)
    elif fault == "one tap missing":
        weight[0, 0, 0, 0] = 0.0
    elif fault == "tiles of another picture":
        pixels[1, :, 8:] = pixels[0, :, 8:]
    found = convolve(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), weight)[:, :, 1:-1, 1:-1] if fault == "no border" else None
    assert off(convolve(pixels, weight) if found is None else found, wanted) > 100 * WINOGRAD


@needs_native
def test_same_convolution_for_any_number_of_threads() -> None:
    pixels, weight = drawn(11, 40, 9, 6, seed=0, dtype=torch.float32), drawn(64, 40, 3, 3, seed=1, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(convolve(pixels, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@needs_native
@pytest.mark.parametrize("numbers", FORMATS, ids=str)
def test_same_bits_for_any_number_of_threads(numbers: torch.dtype) -> None:
    pixels, gradient = drawn(11, 40, 5, 6, seed=0, dtype=numbers), drawn(11, 64, 5, 6, seed=1, dtype=numbers)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(weight_gradient(pixels, gradient))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@needs_native
@pytest.mark.parametrize("numbers", FORMATS, ids=str)
@pytest.mark.parametrize("fault", ["turned filters", "a picture missing", "no border"])
def test_a_wrong_weight_gradient_is_caught(fault: str, numbers: torch.dtype) -> None:
    pixels, gradient = drawn(3, 64, 5, 5, seed=0, dtype=numbers), drawn(3, 32, 5, 5, seed=1, dtype=numbers)
    found = weight_gradient(pixels, gradient)
    if fault == "turned filters":
        found = found.flip(2, 3)
    elif fault == "a picture missing":
        found = weight_gradient(pixels[:2], gradient[:2])
    else:
        inner = torch.zeros_like(gradient)
        inner[:, :, 1:-1, 1:-1] = gradient[:, :, 1:-1, 1:-1]
        found = weight_gradient(pixels, inner)
    with pytest.raises(AssertionError):
        check(pixels, gradient, found)


@needs_native
@pytest.mark.parametrize("numbers", FORMATS, ids=str)
def test_in_training_it_is_near(numbers: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 as near as the library's; its float32 is nearer than ours. Wherever it wins: the code is the same here."""
    monkeypatch.setattr(convolution, "ENGINES", {numbers: (native().module.conv.isa(),)})
    least = WINOGRAD if numbers == torch.float32 else 0.0
    layer, pixels, gradient = Conv3x3(64, 32), drawn(6, 64, 7, 7, seed=0).float(), drawn(6, 32, 7, 7, seed=1)
    plain = torch.nn.Conv2d(64, 32, 3, padding=1, bias=False)
    plain.load_state_dict(layer.state_dict())
    wanted = exact(pixels, layer.weight.detach(), gradient)
    errors = []
    for module in (layer, plain):
        taken = pixels.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=numbers == torch.bfloat16):
            result = module(taken)
        assert result.dtype == numbers
        assert (type(result.grad_fn).__name__ == "_ConvolutionBackward") == (module is layer)
        found = torch.autograd.grad(result, (taken, module.weight), gradient.to(numbers))
        assert found[1].dtype == torch.float32
        errors.append([off(a, b) for a, b in zip(found, wanted, strict=True)])
    assert all(own <= max(1.1 * library, least) for own, library in zip(*errors, strict=True))


@needs_native
@pytest.mark.parametrize("reason", ["float64", "no gradient", "odd channels", "frozen", "another processor"])
def test_else_the_library_does_it(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    isa = "another" if reason == "another processor" else native().module.conv.isa()
    monkeypatch.setattr(convolution, "ENGINES", dict.fromkeys(FORMATS, (isa,)))
    layer = Conv3x3(64, 8 if reason == "odd channels" else 32).to(torch.float64 if reason == "float64" else torch.float32)
    layer.weight.requires_grad_(reason != "frozen")
    pixels = drawn(2, 64, 5, 5, seed=0, dtype=layer.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=reason != "float64"), torch.set_grad_enabled(reason != "no gradient"):
        result = layer(pixels)
    assert type(result.grad_fn).__name__ != "_ConvolutionBackward"


@needs_native
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_float32_is_ours_too(
    without_gradients: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "ENGINES", {torch.float32: (native().module.conv.isa(),)})
    layer, pixels = Conv3x3(64, 40), torch.randn(3, 64, 9, 7, generator=torch.Generator().manual_seed(0))
    with without_gradients():
        found = layer(pixels)
        assert torch.equal(found, convolve(pixels, layer.weight))
        assert not torch.equal(found, F.conv2d(pixels, layer.weight, padding=1)), "it rounds as its own"
    assert off(found, F.conv2d(pixels.double(), layer.weight.detach().double(), padding=1)) < WINOGRAD
