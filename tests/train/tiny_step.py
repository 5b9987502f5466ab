"""A tiny model, its trainee and batches: a training step without data folder or loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from pairclip_fast.config import LossConfig, OptimizerConfig, ViTConfig
from pairclip_fast.data.loader import Batch
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import build_model
from pairclip_fast.train.device import Placement
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.ema import Ema
from pairclip_fast.train.guard import FiniteGuard
from pairclip_fast.train.loop import LossModule, Trainee
from pairclip_fast.train.optimizer import build_optimizer
from pairclip_fast.train.precision import Precision

CPU = Placement(torch.device("cpu"), "test")
FP32 = Precision("fp32", "cpu", "test")
CAPTIONS = 12


def make_module(seed: int = 0) -> LossModule:
    torch.manual_seed(seed)
    encoder = build_model(ViTConfig(width=16, depth=1, heads=2, mlp_width=16, patch_size=16), tiles=2, tile_size=(32, 32), dim=6)
    bank = nn.functional.normalize(torch.randn(CAPTIONS, 6), dim=-1)
    return LossModule(encoder, ContrastiveLoss(LossConfig(), bank=bank), precision=FP32)


def make_trainee(**changes: Any) -> Trainee:
    """A large eps: Adam with a small one makes full steps of the rounding noise where the gradient is zero (biases of keys)."""
    config = dataclasses.replace(OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3), **changes)
    module = make_module()
    return Trainee(
        module=module,
        optimizer=build_optimizer(module, config=config),
        config=config,
        schedule=lambda step: 1e-2 / (1 + step),
        placement=CPU,
        processes=Processes(),
        scaler=FP32.gradient_scaler(),
        guard=FiniteGuard(CPU.device),
        ema=Ema(module, decay=config.ema_decay) if config.ema_decay else None,
    )


def make_batch(size: int = 8, *, seed: int = 0, padding: int = 0, mixed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(size) < size - padding
    return Batch(
        images=torch.randn(size, 3, 32, 64, generator=generator),
        caption_ids=torch.randint(CAPTIONS, (size,), generator=generator),
        sample_ids=torch.arange(size) + 100 * seed,
        valid=valid,
        epoch=0,
        step=seed,
        partner_caption_ids=torch.randint(CAPTIONS, (size,), generator=generator) if mixed else None,
        mix_weight=torch.rand(size, generator=generator) if mixed else None,
    )


def parameters(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainee.module.named_parameters()}
