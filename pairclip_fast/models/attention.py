"""Multi-head attention over packed queries, keys and values: torch's fused kernel, or our own gradient where that is slow.

On CPUs the backward of torch's flash attention is slow for the few tokens of a small picture. `_ShortAttention` is the
textbook formula as four batched products each way; it keeps the [T, T] weights, which is cheap exactly when T is small.
Forward + backward against torch, measured on two CPUs: T=33 1.1 times as fast in float32 (AVX-512) and 3.5 times in bfloat16
(AMX), T=48 1.3 and 5.3 times; at T=64 float32 gains nothing. Evaluation and CUDA always take torch's kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT_TOKENS = 48
"""Most tokens for which the own gradient wins in float32 on a CPU."""
SHORT_TOKENS_LOW_PRECISION = 64
"""The same for bfloat16 on a CPU with matrix instructions."""


def attention(qkv: Float[Tensor, "batch tokens packed"], *, heads: int) -> Float[Tensor, "batch tokens width"]:
    """`softmax(q k^T / sqrt(d)) v` per head (Vaswani et al. 2017, eq. 1).

    Args:
        qkv: Queries, keys and values side by side, each [B, T, heads * d] with the heads side by side.
        heads: Number of heads.
    """
    if _own_gradient_wins(qkv):
        result: Tensor = _ShortAttention.apply(qkv, heads)
        return result
    query, key, value = split_heads(qkv, heads=heads)
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b h t d -> b t (h d)")


def attention_weights(qkv: Float[Tensor, "batch tokens packed"], *, heads: int) -> Float[Tensor, "batch {heads} tokens tokens"]:
    """The softmax of `attention` itself: row = query, column = key, rows sum to 1. For pictures, not for training."""
    query, key, _ = split_heads(qkv, heads=heads)
    scale: float = query.shape[-1] ** -0.5
    return torch.softmax(query.float() @ key.float().mT * scale, dim=-1)


def split_heads(qkv: Float[Tensor, "batch tokens packed"], *, heads: int) -> Float[Tensor, "3 batch {heads} tokens head_width"]:
    """Queries, keys and values as views with the heads in front of the tokens."""
    return rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)


def _own_gradient_wins(qkv: Tensor) -> bool:
    if qkv.device.type == "meta":  # FLOPs are counted on meta tensors, and by the formula, not by what a fused kernel recomputes
        return True
    limit = SHORT_TOKENS if qkv.dtype in (torch.float32, torch.float64) else SHORT_TOKENS_LOW_PRECISION
    return qkv.device.type == "cpu" and qkv.shape[1] <= limit and torch.is_grad_enabled() and qkv.requires_grad


class _ShortAttention(torch.autograd.Function):
    """Attention that keeps its weights. Equal to torch's to rounding; differentiable once."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        query, key, value = rearrange(qkv, "b t (three h d) -> three (b h) t d", three=3, h=heads)
        ctx.heads, ctx.scale = heads, query.shape[-1] ** -0.5
        scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=ctx.scale)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        return rearrange(torch.bmm(weights, value), "(b h) t d -> b t (h d)", h=heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        grad = rearrange(grad, "b t (h d) -> (b h) t d", h=ctx.heads)
        grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, value.mT), weights, -1, weights.dtype)
        packed = torch.empty((3, *query.shape), dtype=query.dtype, device=query.device)
        torch.baddbmm(packed[0], grad_scores, key, beta=0, alpha=ctx.scale, out=packed[0])
        torch.baddbmm(packed[1], grad_scores.mT, query, beta=0, alpha=ctx.scale, out=packed[1])
        torch.bmm(weights.mT, grad, out=packed[2])
        return rearrange(packed, "three (b h) t d -> b t (three h d)", h=ctx.heads), None
