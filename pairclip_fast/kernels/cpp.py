"""The bank operations on a CPU, in C++ (`csrc/kernels`): streamed over the bank, fused, bitwise repeatable.

The scores of a few rows against a few hundred captions stay in the first-level cache and are used up there, so memory does
not grow with the bank, and nothing is as slow as writing scores down. float32 and bfloat16 are covered; bfloat16 is widened,
or multiplied by tile instructions where the processor has them. How many threads work is torch's setting; what they compute
does not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairclip_fast.native import native

MOST_CAPTIONS = 2**31 - 1
"""Captions are counted, and remembered by `bank_topk`, in 32 bits."""


def why_not(_device: torch.device, *, dtype: torch.dtype, dim: int) -> str | None:  # noqa: ARG001 - all alike
    """The reason why nothing of it can run; None if it can."""
    found = native()
    return found.reason if found.module is None else None


def describe(_device: torch.device) -> str:
    """Instruction set and precision."""
    name = best_engine()
    wide, narrow = (_kernels().precision(name, bfloat16) for bfloat16 in (False, True))
    return f"C++, {name}, {wide}" if wide == narrow else f"C++, {name}, float32 by {wide}, bfloat16 by {narrow}"


def best_engine() -> str:
    """The fastest engine of this machine."""
    name: str = _kernels().engines()[-1]
    return name


def covers(emb: Tensor, bank: Tensor) -> bool:
    """Whether dtype, size and layout are covered."""
    plain = all(tensor.stride(1) == 1 or tensor.shape[1] == 1 for tensor in (emb, bank))
    return emb.dtype in (torch.float32, torch.bfloat16) and plain and emb.shape[1] > 0 and bank.shape[0] <= MOST_CAPTIONS


def bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor, *, engine: str | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.bank_softmax`. `engine` is for tests and benchmarks, here and below."""
    lse, mean = _floats(emb.shape[0]), _floats(*emb.shape)
    _kernels().bank_softmax(*_arguments(emb, bank, engine), scale.item(), lse, mean)
    return lse, mean


def bank_stats(
    emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None, *, engine: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.bank_stats`."""
    lse, best = _floats(emb.shape[0]), _floats(emb.shape[0])
    greater, equal = (torch.empty(emb.shape[0], dtype=torch.int32) for _ in range(2))
    _kernels().bank_stats(*_arguments(emb, bank, engine), scale.item(), *_positives(targets, groups), lse, best, greater, equal)
    return lse, best, greater, equal


def pair_scores(emb: Tensor, bank: Tensor, indices: Tensor, *, engine: str | None = None) -> Tensor:
    """See `reference.pair_scores`; the same pair scores the same as in the other operations, bit for bit."""
    scores = _floats(*indices.shape)
    _kernels().pair_scores(*_arguments(emb, bank, engine), indices.contiguous(), scores)
    return scores


def bank_topk(emb: Tensor, bank: Tensor, k: int, *, engine: str | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.bank_topk`."""
    scores, indices = _floats(emb.shape[0], k), torch.empty(emb.shape[0], k, dtype=torch.int64)
    _kernels().bank_topk(*_arguments(emb, bank, engine), k, scores, indices)
    return scores, indices


def _kernels() -> Any:
    return native().module.kernels


def _arguments(emb: Tensor, bank: Tensor, engine: str | None) -> tuple[str, int, Tensor, Tensor]:
    return engine or best_engine(), torch.get_num_threads(), emb.detach(), bank.detach()


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _positives(targets: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's positives as a range of a list of captions: the list, where each range begins, where it ends."""
    if groups is None:
        rows = torch.arange(targets.shape[0])
        return targets.contiguous(), rows, rows + 1
    order = torch.argsort(groups, stable=True)
    ordered, wanted = groups[order], groups[targets]
    return order, torch.searchsorted(ordered, wanted), torch.searchsorted(ordered, wanted, right=True)
