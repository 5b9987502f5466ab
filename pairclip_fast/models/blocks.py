"""The transformer block that both transformers are made of, and its initialisation.

Plain modules with plain parameters: names and shapes stay stable across implementations, so a faster step can take over
the arithmetic without touching checkpoints.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.models.attention import attention, attention_weights

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed input projection and an output projection, both with bias."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        attended: Tensor = self.out(attention(self.qkv(tokens), heads=self.heads))
        return attended

    def weights(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention weights that `forward` uses inside."""
        return attention_weights(self.qkv(tokens), heads=self.heads)


class Block(nn.Module):
    """Attention and MLP, each with a residual connection and a LayerNorm before (Xiong et al. 2020) or after it (Vaswani et al. 2017)."""

    def __init__(self, width: int, *, heads: int, mlp_width: int, activation: Activation, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads=heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), ACTIVATIONS[activation](), nn.Linear(mlp_width, width))

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        if self.pre_norm:
            tokens = tokens + self.attention(self.norm1(tokens))
            tokens = tokens + self.mlp(self.norm2(tokens))
        else:
            tokens = self.norm1(tokens + self.attention(tokens))
            tokens = self.norm2(tokens + self.mlp(tokens))
        return tokens

    def attention_map(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention weights of this block for the tokens that enter it."""
        return self.attention.weights(self.norm1(tokens) if self.pre_norm else tokens)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform for every linear map (Glorot and Bengio 2010), zero for its bias; queries, keys and values are three maps."""
    for part in module.modules():
        if isinstance(part, SelfAttention):
            for weight in part.qkv.weight.detach().chunk(3):
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(part.qkv.bias)
            _xavier(part.out)
        elif isinstance(part, Block):
            for layer in part.mlp:
                if isinstance(layer, nn.Linear):
                    _xavier(layer)


def _xavier(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
