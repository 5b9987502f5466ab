"""Our attention gradient against torch's, and the rule that chooses between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.models.attention import (
    SHORT_TOKENS,
    SHORT_TOKENS_LOW_PRECISION,
    _own_gradient_wins,
    _ShortAttention,
    attention,
    attention_weights,
)


def oracle(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, packed = qkv.shape
    query, key, value = qkv.view(batch, tokens, 3, heads, packed // 3 // heads).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, packed // 3)


@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 5, 2, 3), (1, 1, 1, 4), (3, 33, 8, 64)])
def test_values_and_gradients_equal_torch(batch: int, tokens: int, heads: int, width: int) -> None:
    qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch, tokens, heads * width, dtype=torch.float64)
    got, want = attention(qkv, heads=heads), oracle(qkv, heads)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), qkv), torch.autograd.grad((want * weight).sum(), qkv))


def test_gradcheck() -> None:
    qkv = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _ShortAttention.apply(x, 2), (qkv,))


def test_float32_is_as_exact_as_torch() -> None:
    qkv = torch.randn(2, 33, 3 * 64)
    want = oracle(qkv.double(), 4)
    ours = float((_ShortAttention.apply(qkv, 4).double() - want).abs().max())
    assert ours <= 2 * float((oracle(qkv, 4).double() - want).abs().max()) + 1e-6


def test_it_is_used_only_where_it_wins() -> None:
    def wins(tokens: int, **options: object) -> bool:
        return _own_gradient_wins(torch.empty(1, tokens, 6, **options))  # type: ignore[arg-type]

    assert wins(SHORT_TOKENS, requires_grad=True)
    assert not wins(SHORT_TOKENS + 1, requires_grad=True)
    assert wins(SHORT_TOKENS_LOW_PRECISION, requires_grad=True, dtype=torch.bfloat16)
    assert not wins(SHORT_TOKENS)
    assert wins(10_000, device="meta")
    with torch.no_grad():
        assert not wins(2, requires_grad=True)


def test_weights_are_those_that_attention_uses() -> None:
    qkv = torch.randn(2, 5, 3 * 8)
    weights = attention_weights(qkv, heads=2)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 5))
    value = qkv[..., 16:].reshape(2, 5, 2, 4).transpose(1, 2)
    torch.testing.assert_close((weights @ value).transpose(1, 2).reshape(2, 5, 8), attention(qkv, heads=2))
