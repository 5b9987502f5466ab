"""Adam, AdamW and Muon with weight decay where it belongs: on matrices and filters.

Decaying a bias, a normalisation gain, a position embedding or `logit_scale` pulls it towards a value that means nothing;
`decay_all` does so all the same, to repeat runs made with a plain `AdamW(model.parameters())`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pairclip_fast.config import OptimizerConfig
from pairclip_fast.train.device import supports_fused_adam
from pairclip_fast.train.muon import MuonAdamW

UNDECAYED_WORDS = ("position", "pos_embed", "cls", "class_token", "logit_scale")
"""Parts of names of parameters that are no matrices although they may have two or more dimensions."""
TRUNK_WORDS = (".blocks.", ".stages.")
"""Parts of names of the parameters between an encoder's first layer and its head."""


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter by default: two or more dimensions, and no embedding of a position."""
    return parameter.ndim >= 2 and not any(word in name for word in UNDECAYED_WORDS)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may orthogonalise the updates: matrices and filters of the trunk, not of its first layer or the head."""
    return parameter.ndim >= 2 and any(word in name for word in TRUNK_WORDS)


def parameter_groups(module: nn.Module, *, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters in groups: orthogonalised (with muon), decayed, and neither; an empty group is left out.

    A group's `lr_ratio` is its learning rate as a multiple of the scheduled one.
    """
    orthogonal: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.kind == "muon" and is_hidden_matrix(name, parameter):
            orthogonal.append(parameter)
        else:
            (decayed if config.decay_all or is_decayed(name, parameter) else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": orthogonal, "weight_decay": config.weight_decay, "lr_ratio": config.muon_lr / config.lr, "orthogonal": True},
        {"params": decayed, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": kept, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, *, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters of `module`, fused where the device has the kernel.

    The fused kernel also skips its update when told that a gradient is not finite, which keeps that check on the device.
    """
    fused = all(supports_fused_adam(parameter) for parameter in module.parameters())
    groups = parameter_groups(module, config=config)
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": fused}
    if config.kind == "muon":
        return MuonAdamW(groups, momentum=config.muon_momentum, **adam)
    return (torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam)(groups, **adam)
