"""The bank operations: what the losses and the evaluation call, with every argument checked before anything runs.

Callers use the functions of this module and nothing below it. `bank_softmax` is attention with keys = values = bank: one
pass gives `lse` and `mean`, and then the gradient of the loss `lse - scale * e.t` is `scale * (mean - t)`, elementwise.
Training costs 4BND FLOPs instead of the 6BND of eager torch, and what is saved for the backward is [B, D], never [B, N].
The bank is frozen by contract: asking for its gradient fails.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pairclip_fast.kernels.choice import Implementation, implementation
from pairclip_fast.kernels.registration import registered

__all__ = [
    "BankStats",
    "Implementation",
    "bank_cross_entropy",
    "bank_softmax",
    "bank_stats",
    "bank_topk",
    "implementation",
    "pair_scores",
]

MAX_K = 1024
"""Largest `k` of `bank_topk`; the device kernels keep k candidates per row on chip."""
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BankStats(NamedTuple):
    """Per row: log-partition, best score among the positives, captions that score higher, captions that score equal."""

    lse: Float[Tensor, " batch"]
    positive: Float[Tensor, " batch"]
    greater: Int[Tensor, " batch"]
    equal: Int[Tensor, " batch"]


def bank_softmax(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dim"]]:
    """Log-partition of the softmax over the whole bank, and its mean caption.

    Args:
        emb: Image features.
        bank: Caption features; frozen.
        scale: Multiplier of the dot products (1 / temperature).

    Returns:
        `lse` [B] with `lse_i = log sum_j exp(scale e_i.c_j)`, differentiable once in `emb` and `scale`; `mean` [B, D] with
        `mean_i = sum_j p_ij c_j`, a by-product that carries no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the bank is empty or wants a gradient, or `scale` is not finite.
    """
    _check(emb, bank)
    _check_scale(scale, emb)
    lse, mean = registered("bank_softmax")(emb, bank, scale)
    return lse, mean


def bank_cross_entropy(
    emb: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "captions dim"],
    scale: Float[Tensor, ""],
    target: Float[Tensor, "batch dim"],
) -> Float[Tensor, " batch"]:
    """Cross entropy of the softmax over the whole bank, per row: `lse_i - scale e_i.t_i`.

    The same arithmetic on `bank_softmax` would keep the targets and several gradients of their size; this keeps one.

    Args:
        emb: Image features.
        bank: Caption features; frozen.
        scale: Multiplier of the dot products (1 / temperature).
        target: `t_i = sum_j w_ij c_j`, the captions a row should point to, with weights that sum to 1; frozen.

    Returns:
        The loss of each row, differentiable once in `emb` and `scale`.

    Raises:
        ValueError: as `bank_softmax`, or the target has another shape or wants a gradient.
    """
    _check(emb, bank)
    _check_scale(scale, emb)
    if target.shape != emb.shape or target.device != emb.device:
        got = f"{tuple(target.shape)} on {target.device}"
        raise ValueError(f"target: expected {tuple(emb.shape)} on {emb.device}, got {got}")
    if target.requires_grad:
        raise ValueError("target: expected a frozen tensor; its gradient is not implemented")
    rows: Tensor = registered("bank_cross_entropy")(emb, bank, scale, target)[0]
    return rows


def bank_stats(
    emb: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "captions dim"],
    scale: Float[Tensor, ""],
    targets: Int[Tensor, " batch"],
    *,
    groups: Int[Tensor, " captions"] | None = None,
) -> BankStats:
    """What ranking metrics need of a row of scores, without keeping the row. No gradient.

    Args:
        emb: Image features.
        bank: Caption features.
        scale: Multiplier of the dot products in `lse`; ranks do not depend on it.
        targets: The true caption of each row.
        groups: Captions with the same number are identical: positives of each other, never competitors. None: all differ.

    Returns:
        `lse`, `positive` (unscaled best score among the positives), `greater` and `equal` (int32 counts of non-positives).
        The pessimistic rank is `1 + greater + equal`. A row with NaN counts every caption as greater.

    Raises:
        ValueError: as `bank_softmax`, or a target out of range, or groups of another length.
    """
    _check(emb, bank)
    _check_scale(scale, emb)
    _check_index("targets", targets, emb, bank, lowest=0)
    if groups is not None and groups.shape != bank.shape[:1]:
        raise ValueError(f"groups: expected one number per caption ({bank.shape[0]}), got shape {tuple(groups.shape)}")
    return BankStats(*registered("bank_stats")(emb, bank, scale, targets, groups))


def pair_scores(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], indices: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen"]:
    """Dot products of each row with captions chosen for it; an index of -1 gives -inf. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an index is out of range.
    """
    _check(emb, bank)
    _check_index("indices", indices, emb, bank, lowest=-1)
    result: Tensor = registered("pair_scores")(emb, bank, indices)
    return result


def bank_topk(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], *, k: int
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """The `k` best captions of each row, exact: score descending, then index ascending. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `k` is not in 1..min(N, 1024).
    """
    _check(emb, bank)
    if not 1 <= k <= min(bank.shape[0], MAX_K):
        raise ValueError(f"k: expected 1..{min(bank.shape[0], MAX_K)} for a bank of {bank.shape[0]} captions, got {k}")
    scores, indices = registered("bank_topk")(emb, bank, k)
    return scores, indices


def _check(emb: Tensor, bank: Tensor) -> None:
    if emb.ndim != 2 or bank.ndim != 2 or emb.shape[1] != bank.shape[1]:
        raise ValueError(f"emb and bank: expected [B, D] and [N, D], got {tuple(emb.shape)} and {tuple(bank.shape)}")
    if emb.dtype != bank.dtype or emb.dtype not in FLOATING:
        raise ValueError(f"emb and bank: expected one floating dtype, got {emb.dtype} and {bank.dtype}")
    if emb.device != bank.device:
        raise ValueError(f"emb and bank: expected one device, got {emb.device} and {bank.device}")
    if bank.shape[0] == 0:
        raise ValueError("bank: expected at least one caption, got none")
    if bank.requires_grad:
        raise ValueError("bank: expected a frozen tensor; the gradient with respect to the bank is not implemented")


def _check_scale(scale: Tensor, emb: Tensor) -> None:
    if scale.ndim != 0 or not scale.is_floating_point() or scale.device != emb.device:
        got = f"{tuple(scale.shape)} {scale.dtype} on {scale.device}"
        raise ValueError(f"scale: expected a 0-dim floating tensor on {emb.device}, got {got}")
    # Reading a value would stall a CUDA stream and break a trace; there the loss shows the NaN.
    if _readable(scale) and not math.isfinite(scale.item()):
        raise ValueError(f"scale: expected a finite number, got {scale.item()}")


def _check_index(name: str, index: Tensor, emb: Tensor, bank: Tensor, *, lowest: int) -> None:
    if index.shape[:1] != emb.shape[:1] or index.device != emb.device or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: expected int32 or int64 indices for {emb.shape[0]} rows on {emb.device}, "
            f"got {tuple(index.shape)} {index.dtype} on {index.device}"
        )
    if index.numel() and _readable(index) and not (lowest <= int(index.min()) and int(index.max()) < bank.shape[0]):
        raise ValueError(f"{name}: expected {lowest}..{bank.shape[0] - 1}, got {int(index.min())}..{int(index.max())}")


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
