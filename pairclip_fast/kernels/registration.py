"""The bank operations as torch library ops: schema, body, shapes for tracing, gradient, FLOP formula.

Registered ops are opaque to `torch.compile` and to autograd; their body asks `choice` which implementation runs. The
operators are made with `define` and `impl` rather than `custom_op`: the same ops, but their first call does not import the
compiler, which takes 1 to 5 seconds. Registering is the one thing this package does at import time; torch offers no later
moment that tracing, autograd and the FLOP counter would all respect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from pairclip_fast.kernels.choice import kernels_for
from pairclip_fast.kernels.exact import exact_products, outside_autocast

NAMESPACE = "pairclip"
DOTTED_ROWS = 1024
"""Rows of which products are written down at a time: 2 MB for 512 features."""


def registered(name: str) -> Callable[..., Any]:
    """The op `pairclip::name`, whichever implementation the dispatcher picks for its arguments."""
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def _bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    with outside_autocast(emb.device):
        return kernels_for(emb, bank).bank_softmax(emb, bank, scale)


def _bank_cross_entropy(emb: Tensor, bank: Tensor, scale: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean turns into the gradient's direction in place: one [B, D] is all that the backward needs."""
    lse, difference = _bank_softmax(emb, bank, scale)
    with outside_autocast(emb.device):
        difference -= target
        return lse - scale * _row_dots(emb, target, lse.dtype), difference


def _row_dots(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    parts = zip(torch.split(left, DOTTED_ROWS), torch.split(right, DOTTED_ROWS), strict=True)
    return torch.cat([(a.to(dtype) * b.to(dtype)).sum(dim=1) for a, b in parts])


def _bank_stats(emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
    with exact_products(emb.device):
        return kernels_for(emb, bank).bank_stats(emb, bank, scale, targets.long(), groups)


def _pair_scores(emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    with exact_products(emb.device):
        return kernels_for(emb, bank).pair_scores(emb, bank, indices.long())


def _bank_topk(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with exact_products(emb.device):
        return kernels_for(emb, bank).bank_topk(emb, bank, k)


def _accumulator(emb: Tensor) -> torch.dtype:
    return torch.float64 if emb.dtype == torch.float64 else torch.float32


def _fake_bank_softmax(emb: Tensor, _bank: Tensor, _scale: Tensor) -> tuple[Tensor, Tensor]:
    return emb.new_empty(emb.shape[0], dtype=_accumulator(emb)), emb.new_empty(emb.shape, dtype=_accumulator(emb))


def _fake_bank_cross_entropy(emb: Tensor, bank: Tensor, scale: Tensor, _target: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_bank_softmax(emb, bank, scale)


def _fake_bank_stats(emb: Tensor, _bank: Tensor, _scale: Tensor, _targets: Tensor, _groups: Tensor | None) -> tuple[Tensor, ...]:
    dtypes = (_accumulator(emb), _accumulator(emb), torch.int32, torch.int32)
    return tuple(emb.new_empty(emb.shape[0], dtype=dtype) for dtype in dtypes)


def _fake_pair_scores(emb: Tensor, _bank: Tensor, indices: Tensor) -> Tensor:
    return emb.new_empty(indices.shape, dtype=_accumulator(emb))


def _fake_bank_topk(emb: Tensor, _bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return emb.new_empty(emb.shape[0], k, dtype=_accumulator(emb)), emb.new_empty(emb.shape[0], k, dtype=torch.int64)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    emb, _bank, scale = inputs[:3]
    _, direction = output
    ctx.save_for_backward(emb, scale, direction)
    ctx.mark_non_differentiable(direction)
    ctx.set_materialize_grads(False)  # or the direction's gradient, which does not exist, would be a [B, D] of zeros


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """d row_i / d e_i = scale direction_i; d row_i / d scale = e_i . direction_i (no second pass over the bank)."""
    if grad is None:
        return None, None
    emb, scale, direction = ctx.saved_tensors
    grad_scale = (grad * _row_dots(emb, direction, direction.dtype)).sum().to(scale.dtype) if ctx.needs_input_grad[2] else None
    return (_scaled_rows(direction, grad * scale, emb.dtype) if ctx.needs_input_grad[0] else None), grad_scale


def _scaled_rows(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """`factors[:, None] * rows`, rounded once at the end, without a second [B, D] where the dtypes differ."""
    if rows.dtype == dtype:
        return rows * factors[:, None]
    parts = zip(torch.split(rows, DOTTED_ROWS), torch.split(factors, DOTTED_ROWS), strict=True)
    return torch.cat([(part * factor[:, None]).to(dtype) for part, factor in parts])


@once_differentiable
def _softmax_backward(ctx: Any, grad_lse: Tensor | None, _grad_mean: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
    grad_emb, grad_scale = _gradients(ctx, grad_lse)
    return grad_emb, None, grad_scale


@once_differentiable
def _cross_entropy_backward(
    ctx: Any, grad_rows: Tensor | None, _grad_difference: Tensor | None
) -> tuple[Tensor | None, None, Tensor | None, None]:
    grad_emb, grad_scale = _gradients(ctx, grad_rows)
    return grad_emb, None, grad_scale, None


def _flops_two_products(emb: torch.Size, bank: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 4 * emb[0] * bank[0] * emb[1]


def _flops_one_product(emb: torch.Size, bank: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * emb[0] * bank[0] * emb[1]


def _flops_chosen(emb: torch.Size, _bank: torch.Size, indices: torch.Size, **_kwargs: Any) -> int:
    return 2 * indices[0] * indices[1] * emb[1]


def _register(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int], *tags: torch.Tag
) -> None:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(qualified, "default", body)
    torch.library.register_fake(qualified, fake)
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)


_register(
    "bank_softmax", "(Tensor emb, Tensor bank, Tensor scale) -> (Tensor, Tensor)", _bank_softmax, _fake_bank_softmax, _flops_two_products
)
_register(
    "bank_cross_entropy",
    "(Tensor emb, Tensor bank, Tensor scale, Tensor target) -> (Tensor, Tensor)",
    _bank_cross_entropy,
    _fake_bank_cross_entropy,
    _flops_two_products,
)
_register(
    "bank_stats",
    "(Tensor emb, Tensor bank, Tensor scale, Tensor targets, Tensor? groups) -> (Tensor, Tensor, Tensor, Tensor)",
    _bank_stats,
    _fake_bank_stats,
    _flops_one_product,
    torch.Tag.cudagraph_unsafe,  # torch's reads from the device how large the groups are
)
_register("pair_scores", "(Tensor emb, Tensor bank, Tensor indices) -> Tensor", _pair_scores, _fake_pair_scores, _flops_chosen)
_register(
    "bank_topk",
    "(Tensor emb, Tensor bank, int k) -> (Tensor, Tensor)",
    _bank_topk,
    _fake_bank_topk,
    _flops_one_product,
    torch.Tag.cudagraph_unsafe,  # it reads from the device which rows need the plain way
)
torch.library.register_autograd(f"{NAMESPACE}::bank_softmax", _softmax_backward, setup_context=_save_for_backward)
torch.library.register_autograd(f"{NAMESPACE}::bank_cross_entropy", _cross_entropy_backward, setup_context=_save_for_backward)
