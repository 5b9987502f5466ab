"""The matrix products and convolutions of a training step, found by running it without data, and how fast each is by itself.

Their times added up are the GEMM bound: what the step would take if nothing else cost anything. Shapes and memory layouts are
those that torch's operations really get, forward and backward, so a slow weight gradient is timed as the step asks for it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"
REPEATS, SECONDS = 3, 0.15
"""A product is computed so many times and at least so long; the fastest counts, for a bound may not be spoilt by the neighbours
of a shared machine."""
aten = torch.ops.aten
MULTIPLIED = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
"""Where the two factors begin among the arguments."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Shape and strides of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Random numbers so laid out; an operand that repeats its numbers (stride 0) is laid out densely."""
        if 0 in self.stride:
            return torch.randn(self.shape).to(dtype)
        return torch.empty_strided(self.shape, self.stride, dtype=dtype).normal_()


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, or with `window` (stride, padding) a convolution."""

    kind: str
    operands: tuple[Layout, ...]
    """Left and right; of a convolution: input, weight, and in the backward pass the output's gradient."""
    flop: int
    window: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def words(self) -> str:
        """The operands' shapes, for tables."""
        shapes = [" x ".join(map(str, one.shape)) for one in self.operands[:2]]
        return (", " if self.window else " @ ").join(shapes)

    def call(self, dtype: torch.dtype) -> Callable[[], object]:
        """Computes it once per call."""
        tensors = [one.tensor(dtype) for one in self.operands]
        if self.window is None:
            left, right = tensors
            return lambda: torch.matmul(left, right)
        stride, padding = self.window
        if self.kind == FORWARD:
            return lambda: aten.convolution(*tensors, None, stride, padding, [1, 1], False, [0, 0], 1)
        pixels, weight, gradient = tensors
        wanted = [self.kind == INPUT_GRADIENT, self.kind == WEIGHT_GRADIENT, False]
        return lambda: aten.convolution_backward(gradient, pixels, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that pass by."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Product] = Counter()
        self.backward = False
        self.weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in MULTIPLIED:
            self._product(*args[MULTIPLIED[packet] :][:2])
        elif packet == aten.convolution:
            self._convolution(result, args[0], args[1], window=(tuple(args[3]), tuple(args[4])))
        elif packet == aten.convolution_backward:
            window, wanted = (tuple(args[4]), tuple(args[5])), args[10]
            for kind, asked in zip((INPUT_GRADIENT, WEIGHT_GRADIENT), wanted, strict=False):
                if asked:
                    self._convolution(args[0], args[1], args[2], window=window, kind=kind)
        return result

    def _product(self, left: Tensor, right: Tensor) -> None:
        shape = (left.shape[-2], right.shape[-1])
        gradient = WEIGHT_GRADIENT if shape in self.weights and left.ndim == 2 else INPUT_GRADIENT
        kind = gradient if self.backward else FORWARD
        self.found[Product(kind, (Layout.of(left), Layout.of(right)), 2 * left.numel() * right.shape[-1])] += 1

    def _convolution(self, output: Tensor, pixels: Tensor, weight: Tensor, *, window: Any, kind: str = FORWARD) -> None:
        operands = (pixels, weight) if kind == FORWARD else (pixels, weight, output)
        flop = 2 * output.numel() * weight[0].numel()
        self.found[Product(kind, tuple(Layout.of(one) for one in operands), flop, window)] += 1


def products(encoder: nn.Module, *, images: tuple[int, ...], captions: int) -> Counter[Product]:
    """The products of one step, each with the number of times it is computed.

    Args:
        encoder: Image tower; it is copied to the meta device and not touched.
        images: Shape of a batch.
        captions: In the bank's softmax, forward and backward; 0 to leave it out.
    """
    shadow = copy.deepcopy(encoder).to("meta").train()
    weights = {tuple(one.shape) for one in shadow.parameters()}
    watch = _Watch(weights)
    with watch:
        features = shadow(torch.empty(images, device="meta"))
        if captions:
            bank = torch.empty(captions, features.shape[1], device="meta")
            torch.softmax(features.detach() @ bank.T, dim=1) @ bank  # the mean that the gradient needs comes with the forward pass
        watch.backward = True
        features.sum().backward()
    return watch.found


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls."""
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < SECONDS:
        taken.append(timing.measure(call).wall_s)
    return min(taken)


@torch.no_grad()
def rates(found: Counter[Product], *, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time every product by itself; rows in order of their share."""
    rows = []
    for product, count in found.items():
        call = product.call(dtype)
        call()
        seconds = fastest(call)
        rows.append(
            {
                "kind": product.kind,
                "operation": "product" if product.window is None else "convolution",
                "shapes": product.words,
                "count": count,
                "gflop": product.flop * count / 1e9,
                "seconds": seconds * count,
                "gflops": product.flop / seconds / 1e9,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])
