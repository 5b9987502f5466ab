"""Convolutional stages: 3x3 filters that halve the picture, for the convolutional encoder and for the transformer's stem."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.models.blocks import ACTIVATIONS, Activation
from pairclip_fast.models.convolution import Conv3x3
from pairclip_fast.models.fused_norm import normalise

Norm = Callable[[int], nn.Module]
"""From a number of channels to a normalisation over them."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel. As fast as batch norm here, and a picture's features depend on no other
    picture: micro-batches, processes and evaluation all compute the same function.
    """

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded channels height width"]:
        return super().forward(pixels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Halving(nn.Module):
    """Convolution, maximum of 2x2 pixels, normalisation, activation."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation, norm: Norm) -> None:
        super().__init__()
        self.widen = Conv3x3(inputs, outputs)
        self.norm1 = norm(outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded wider half_height half_width"]:
        return normalise(self.widen(pixels), norm=self.norm1, activation=self.activation, pool=True)


class Stage(Halving):
    """A halving and one more convolution: pooling first lets the second one work on a quarter of the pixels."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation, norm: Norm) -> None:
        super().__init__(inputs, outputs, activation=activation, norm=norm)
        self.refine = Conv3x3(outputs, outputs)
        self.norm2 = norm(outputs)

    def forward(self, pixels: Float[Tensor, "folded channels height width"]) -> Float[Tensor, "folded wider half_height half_width"]:
        return normalise(self.refine(super().forward(pixels)), norm=self.norm2, activation=self.activation, pool=False)
