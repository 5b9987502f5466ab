"""What every kernel computes, in the plainest torch that says it.

These are the definitions that faster implementations are measured against: whole matrices, any floating dtype (the
tests use float64), differentiable by autograd, no care for memory or speed. Nothing outside the tests calls them.

Common arguments: `emb` [B, D] are the image features, `bank` [N, D] the caption features, `scale` a 0-dim tensor that
multiplies the dot products. `groups` [N] gives captions that are identical the same number: they are positives of each
other and never count as competitors. Scores are unscaled dot products; the order of captions does not depend on `scale`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bank_softmax(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dim"]]:
    """Log-partition and softmax-weighted mean of the bank: `lse_i = log sum_j exp(scale e_i.c_j)`, `mean_i = sum_j p_ij c_j`."""
    logits = scale * (emb @ bank.T)
    return torch.logsumexp(logits, dim=1), torch.softmax(logits, dim=1) @ bank


def bank_loss(
    emb: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "captions dim"],
    scale: Float[Tensor, ""],
    targets: Float[Tensor, "batch captions"],
) -> Float[Tensor, " batch"]:
    """Cross entropy of the softmax over the bank against target distributions whose rows sum to 1."""
    return -(targets * torch.log_softmax(scale * (emb @ bank.T), dim=1)).sum(dim=1)


def bank_stats(
    emb: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "captions dim"],
    scale: Float[Tensor, ""],
    targets: Int[Tensor, " batch"],
    groups: Int[Tensor, " captions"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Log-partition, the positives' best score, and how many other captions score higher (`gt`) or equal (`eq`).

    Rows with a NaN score count every caption as higher: a diverged model never scores a hit.
    """
    scores = emb @ bank.T
    groups = torch.arange(bank.shape[0], device=bank.device) if groups is None else groups
    positive = groups == groups[targets][:, None]
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1)
    greater = (~positive & (scores > best[:, None])).sum(dim=1)
    equal = (~positive & (scores == best[:, None])).sum(dim=1)
    damaged = scores.isnan().any(dim=1)
    greater = torch.where(damaged, bank.shape[0], greater)
    equal = torch.where(damaged, 0, equal)
    return torch.logsumexp(scale * scores, dim=1), best, greater.int(), equal.int()


def pair_scores(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], indices: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen"]:
    """Scores of chosen captions per row; an index of -1 gives -inf."""
    scores = torch.einsum("bd,bpd->bp", emb, bank[indices.clamp(min=0)])
    return scores.masked_fill(indices < 0, -torch.inf)


def bank_topk(
    emb: Float[Tensor, "batch dim"], bank: Float[Tensor, "captions dim"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The `k` best captions per row: score descending, then index ascending (NaN first, as torch sorts)."""
    scores, indices = torch.sort(emb @ bank.T, dim=1, descending=True, stable=True)
    return scores[:, :k], indices[:, :k]
