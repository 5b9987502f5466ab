"""How many floating-point operations a training pair costs: counted on meta tensors, not estimated.

Forward and backward really run (without data) under torch's FLOP counter, so skipped gradients (the first layer's input),
frozen parts and the caption bank are counted as they are and not as "three times the forward". Only matrix products and
convolutions count, one multiply-add as two, as everywhere in the literature. Attention and convolutions are counted by
their formulas whatever runs them: recomputation inside a kernel is not work done for the model, and minimal filtering
(`models.convolution`) does the same work with fewer multiplications.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pairclip_fast.kernels import ops
from pairclip_fast.models.encoder import ImageEncoder

BATCH = 2
"""Pairs per count; the cost is linear in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """What a model costs, per pair."""

    parameters: int
    """Trainable values, head included."""
    head_parameters: int
    """Of these in the projection head."""
    forward_flops: float
    """Image tower alone, evaluation."""
    training_flops: float
    """Forward and backward of the image tower and of the softmax over the caption bank."""


def model_cost(model: nn.Module, *, image_shape: tuple[int, int, int], num_captions: int) -> ModelCost:
    """Count the operations of one training pair.

    Args:
        model: A `PairEncoder` (on any device; it is copied to the meta device and not touched).
        image_shape: Channels, height and width of the stacked picture.
        num_captions: Captions in the bank; 0 to leave the bank's softmax out.
    """
    shadow = copy.deepcopy(model).to("meta").train()
    for part in shadow.modules():
        if isinstance(part, ImageEncoder):
            part.recompute = False  # computing twice is not more work done for the model
    images = torch.empty(BATCH, *image_shape, device="meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        features = shadow(images)
    with FlopCounterMode(display=False) as training:
        features = shadow(images)
        if num_captions:
            bank = torch.empty(num_captions, features.shape[1], device="meta")
            features = ops.bank_softmax(features, bank, torch.ones((), device="meta"))[0]
        features.sum().backward()
    return ModelCost(
        parameters=_trainable(model),
        head_parameters=_trainable(model.head) if isinstance(model.head, nn.Module) else 0,
        forward_flops=forward.get_total_flops() / BATCH,
        training_flops=training.get_total_flops() / BATCH,
    )


def training_flops_per_pair(model: nn.Module, *, image_shape: tuple[int, int, int], num_captions: int) -> float:
    """Operations of one pair through forward, bank loss and backward."""
    return model_cost(model, image_shape=image_shape, num_captions=num_captions).training_flops


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
