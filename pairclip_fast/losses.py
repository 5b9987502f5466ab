"""What is minimised: exact softmax over the caption bank, or symmetric InfoNCE within the batch.

The captions are few and frozen, so the softmax over all of them is exact and costs about half a per cent of the image
tower: no false negatives, no dependence on the batch, and nothing to gather between processes. InfoNCE is the report's
loss; here captions that are the same as the row's own are masked instead of being counted as its negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pairclip_fast.config import LossConfig
from pairclip_fast.kernels import ops

MAX_LOGIT_SCALE = math.log(100.0)
"""CLIP's limit (Radford et al. 2021, section 2.5): beyond it training became unstable."""


class ContrastiveLoss(nn.Module):
    """Loss over a frozen caption bank; owns `logit_scale` (a parameter if it is learned).

    Args:
        config: Kind of loss, temperature, label smoothing.
        bank: L2-normalised caption features.
        groups: Captions with the same number are identical and positives of each other; None if all differ.
        products: The format of what the bank loss multiplies; sums stay in float32. Below it, both sides are rounded: the softmax
            and the targets then come from the same rounded captions, so that a perfect prediction has no gradient.
    """

    logit_scale: Tensor

    def __init__(
        self,
        config: LossConfig,
        *,
        bank: Float[Tensor, "captions dim"],
        groups: Int[Tensor, " captions"] | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.bank = bank.detach().clone()
        rounded = products.itemsize < self.bank.dtype.itemsize and config.kind == "bank"
        self._rounded_bank = self.bank.to(products) if rounded else None
        self._groups = torch.arange(len(bank), device=bank.device) if groups is None else groups.clone()
        captions = self._multiplied.to(self.bank.dtype)
        self._group_means = _group_means(captions, self._groups)
        self._bank_mean = captions.mean(dim=0)
        logit_scale = torch.tensor(-math.log(config.temperature))
        if config.learn_temperature:
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            self.register_buffer("logit_scale", logit_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContrastiveLoss:  # noqa: FBT001
        """Move the constants too. They are no buffers: DDP would broadcast and averages would copy the whole bank every step."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("bank", "_rounded_bank", "_groups", "_group_means", "_bank_mean"):
            constant = getattr(self, name)
            setattr(self, name, None if constant is None else fn(constant))
        return self

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Multiplier of the cosines: `exp(logit_scale)`, at most 100."""
        result: Tensor = _Clamp.apply(self.logit_scale)
        return result.exp()

    @property
    def groups(self) -> Int[Tensor, " captions"] | None:
        """Group of each caption, or None if all captions differ (which saves the ranking work)."""
        return None if self._group_means is None else self._groups

    @property
    def products(self) -> torch.dtype:
        """The format of what the bank loss multiplies."""
        return self._multiplied.dtype

    @property
    def _multiplied(self) -> Tensor:
        """The bank as the bank loss multiplies it."""
        return self.bank if self._rounded_bank is None else self._rounded_bank

    def targets(self, caption_ids: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """What a row should point to: its caption, or the mean of identical ones (weight spread evenly over the group)."""
        return (self._multiplied if self._group_means is None else self._group_means)[caption_ids].to(self.bank.dtype)

    def forward(
        self,
        image_features: Float[Tensor, "batch dim"],
        caption_ids: Int[Tensor, " batch"],
        valid: Bool[Tensor, " batch"] | None = None,
        *,
        partner_caption_ids: Int[Tensor, " batch"] | None = None,
        mix_weight: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss over the valid rows (0 if there are none).

        Args:
            image_features: L2-normalised features.
            caption_ids: The true caption of each row.
            valid: Rows that count; padding rows are neither positives nor negatives of anything.
            partner_caption_ids: The second caption of each row, for mixtures (bank loss only); None for none.
            mix_weight: Share of the first caption in the target, in [0, 1]; the rest is the second one's.
        """
        assert partner_caption_ids is None or self.config.kind == "bank", "the configuration rules this out"
        if valid is None:
            valid = torch.ones_like(caption_ids, dtype=torch.bool)
        # Padding may hold anything, and 0 * NaN is NaN in a gradient: it must not enter the arithmetic at all.
        image_features = torch.where(valid[:, None], image_features, 0.0)
        caption_ids = torch.where(valid, caption_ids, 0)
        with torch.autocast(image_features.device.type, enabled=False):
            if self.config.kind == "bank":
                target = self.targets(caption_ids)
                if partner_caption_ids is not None and mix_weight is not None:
                    partners = self.targets(torch.where(valid, partner_caption_ids, 0))
                    target = torch.lerp(partners, target, mix_weight[:, None].to(target.dtype))
                rows = self._bank_rows(image_features, target)
            else:
                rows = self._infonce_rows(image_features, caption_ids, valid)
        return torch.where(valid, rows, 0.0).sum() / valid.sum().clamp(min=1)

    def _bank_rows(self, image_features: Tensor, target: Tensor) -> Tensor:
        """`-sum_j w_j log p_j = lse - scale e.t` with `t = sum_j w_j c_j`: soft targets cost one vector per row."""
        smoothing = self.config.label_smoothing
        if smoothing:
            target = torch.lerp(target, self._bank_mean.expand_as(target), smoothing)
        return ops.bank_cross_entropy(image_features.to(self._multiplied.dtype), self._multiplied, self.scale, target)

    def _infonce_rows(self, image_features: Tensor, caption_ids: Tensor, valid: Tensor) -> Tensor:
        """Both directions of InfoNCE (van den Oord et al. 2018; Radford et al. 2021, figure 3), duplicates masked.

        With several processes the other side is gathered from all of them: local pictures against all captions, local
        captions against all pictures. Every process must have the same number of rows.
        """
        scale, groups = self.scale, self._groups[caption_ids]
        text_features = self.targets(caption_ids)
        all_images, all_texts = _gather(image_features), self.targets(_gather(caption_ids))
        all_groups, all_valid = _gather(groups), _gather(valid)
        own = torch.arange(len(groups), device=groups.device)
        own_columns = own + (dist.get_rank() * len(groups) if _distributed() else 0)
        hidden = (groups[:, None] == all_groups) | ~all_valid
        hidden &= own_columns[:, None] != torch.arange(len(all_groups), device=groups.device)  # to set one value would wait for the device
        to_text = (scale * image_features @ all_texts.T).masked_fill(hidden, -torch.inf)
        to_image = (scale * text_features @ all_images.T).masked_fill(hidden, -torch.inf)
        return 0.5 * (F.cross_entropy(to_text, own_columns, reduction="none") + F.cross_entropy(to_image, own_columns, reduction="none"))


def _group_means(bank: Tensor, groups: Tensor) -> Tensor | None:
    """Per caption the mean over its group; None if every caption is alone in its group."""
    numbers, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    if len(numbers) == len(bank):
        return None
    sums = torch.zeros(len(numbers), bank.shape[1], dtype=bank.dtype, device=bank.device).index_add_(0, inverse, bank)
    result: Tensor = (sums / counts[:, None])[inverse]
    return result


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: Tensor) -> Tensor:
    """Rows of all processes, in rank order; the gradient of the own rows is summed over the processes."""
    if not _distributed():
        return tensor
    result: Tensor = _Gather.apply(tensor)
    return result


class _Gather(torch.autograd.Function):
    """All-gather whose gradient comes back. DDP then averages parameters' gradients, which makes the loss the global mean."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


class _Clamp(torch.autograd.Function):
    """`min(x, MAX_LOGIT_SCALE)` whose gradient still leads back: a plain clamp would hold a value above the limit there for ever."""

    @staticmethod
    def forward(ctx: Any, logit_scale: Tensor) -> Tensor:
        ctx.save_for_backward(logit_scale)
        return logit_scale.clamp(max=MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logit_scale,) = ctx.saved_tensors
        outward = (logit_scale >= MAX_LOGIT_SCALE) & (grad < 0)
        return grad.masked_fill(outward, 0.0)
