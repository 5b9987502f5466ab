"""The losses by definition, for the check before anything is timed: one caption at a time, no tricks, in the dtype given.

Written apart from `pairclip_fast.losses`, which never forms a target distribution: a benchmark that checked an
implementation against itself would verify nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bank_loss(image_features: Tensor, bank: Tensor, caption_ids: Tensor, *, groups: Tensor, scale: float, label_smoothing: float) -> Tensor:
    """Mean cross entropy over all captions; the target is spread evenly over captions identical to the true one.

    Args:
        image_features: L2-normalised, [B, D].
        bank: All captions' features, [N, D].
        caption_ids: True caption of each row, [B].
        groups: Captions with the same number are identical, [N].
        scale: 1 / temperature.
        label_smoothing: Share of the target spread evenly over all captions.
    """
    losses = []
    for features, caption in zip(image_features, caption_ids.tolist(), strict=True):
        log_p = torch.log_softmax(scale * (bank @ features), dim=0)
        same = (groups == groups[caption]).to(log_p.dtype)
        target = (1.0 - label_smoothing) * same / same.sum() + label_smoothing / len(bank)
        losses.append(-(target * log_p).sum())
    return torch.stack(losses).mean()


def infonce_loss(image_features: Tensor, bank: Tensor, caption_ids: Tensor, *, groups: Tensor, scale: float) -> Tensor:
    """Mean of both directions of InfoNCE within the batch; other rows with an identical caption do not compete.

    Arguments as in `bank_loss`.
    """
    captions, own_groups = bank[caption_ids], groups[caption_ids]
    losses = []
    for row in range(len(caption_ids)):
        rivals = [j for j in range(len(caption_ids)) if j == row or own_groups[j] != own_groups[row]]
        place = rivals.index(row)
        for query, keys in ((image_features[row], captions[rivals]), (captions[row], image_features[rivals])):
            losses.append(-torch.log_softmax(scale * (keys @ query), dim=0)[place])
    return torch.stack(losses).mean()
