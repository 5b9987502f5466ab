"""What of a training's memory can be counted from its tensors, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pairclip_fast.data.loader import PREFETCH_BATCHES
from pairclip_fast.train.loop import Trainee
from pairclip_fast.train.setup import Parts

ROW_BYTES = 8 + 8 + 1
"""Of a batch, beside the pixels: caption id, sample id, valid."""
ADAM_MOMENTS, MUON_MOMENTS = 2, 1


def countable(parts: Parts, trainee: Trainee, *, activations: int | None) -> dict[str, int | None]:
    """Bytes per item of the memory ledger.

    Args:
        parts: Sizes of the batches.
        trainee: Model, averages, optimizer.
        activations: What autograd keeps of one micro-batch; None if that is not known.
    """
    copies = [trainee.module] if trainee.ema is None else [trainee.module, trainee.ema.module]
    return {
        "model": unique_bytes(tensor for module in copies for tensor in tensors_of(module)),
        "loader": (PREFETCH_BATCHES + 1) * batch_bytes(parts),
        "activations": activations,
        "gradients": sum(p.nbytes for p in trainee.module.parameters() if p.requires_grad),
        "optimizer": 0 if trainee.optimizer.state else optimizer_bytes(trainee.optimizer),  # a resumed run has it from the start
    }


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the constants that are plain attributes (the caption bank)."""
    constants = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *constants]


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the state that the optimizer will have after its first step."""
    return sum(
        parameter.nbytes * (MUON_MOMENTS if group.get("orthogonal") else ADAM_MOMENTS)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    )


def batch_bytes(parts: Parts) -> int:
    """Of one process's batch."""
    channels, height, width = parts.image_shape
    pairs = parts.config.train.batch_size // parts.processes.world_size
    return pairs * (4 * channels * height * width + ROW_BYTES)
