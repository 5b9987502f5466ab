"""Evaluation: rank all captions for every pair of a split, streaming, and keep what the report shows.

Per batch a few numbers per pair are kept (about 60 bytes) and the [B, N] scores never exist as a whole, so memory does
not grow with the bank and hardly with the split. Metrics are computed at the end from those numbers, ordered by sample id:
they are the same for every batch size, order and number of processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog
from pairclip_fast.gallery import GALLERY_SIZE, Gallery
from pairclip_fast.kernels import ops
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.metrics import pessimistic_ranks, ranking_metrics, side_accuracy, side_names, swap_rate
from pairclip_fast.text.bank import CaptionBank

TOP_CAPTIONS = 5
"""Best captions kept per pair."""


@runtime_checkable
class Pairs(Protocol):
    """The part of a loader's batch that evaluation reads."""

    @property
    def images(self) -> Tensor: ...
    @property
    def caption_ids(self) -> Tensor: ...
    @property
    def sample_ids(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor: ...


@runtime_checkable
class PairBatches(Protocol):
    """Batches of one whole pass over a split."""

    def __iter__(self) -> Iterator[Pairs]: ...
    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """What the loader's normalisation subtracted and divided by, per channel, in 0..255 units."""

    mean: Sequence[float]
    std: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics for people and programs, arrays for the report."""

    metrics: dict[str, object]
    """JSON-ready; fractions, not per cent."""
    arrays: dict[str, np.ndarray]
    """Per pair, ordered by sample id, and the gallery."""


def evaluate(
    model: nn.Module,
    loss: ContrastiveLoss,
    loader: PairBatches,
    bank: CaptionBank,
    *,
    split: str,
    events: EventLog,
    pixels: PixelStatistics | None = None,
    classes: Int[np.ndarray, "captions sides"] | None = None,
    gallery_size: int = GALLERY_SIZE,
    distributed: bool = False,
) -> Evaluation:
    """Rank every caption for every pair.

    Args:
        model: A `PairEncoder`; put into evaluation mode for the duration.
        loss: Holds the caption features on the model's device, and the temperature for the reported loss.
        loader: One pass over the split; rows that are not valid are left out.
        bank: The captions: which are identical, which are each other's swap.
        split: Name for the metrics.
        events: Shown the progress.
        pixels: Turns normalised images back into pictures; None keeps no gallery.
        classes: Class of each tile by caption; None: as the bank's template says (`caption_classes`).
        gallery_size: Pictures kept, about half hits and half misses.
        distributed: Every process calls this with its own share of the pairs, and every one gets the whole result.
            Otherwise no communication takes place, whether or not there are several processes.

    Raises:
        DataError: no pairs at all, or a caption id outside the bank.
    """
    started = time.perf_counter()
    gallery = Gallery(gallery_size if pixels is not None else 0)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = _rows(model, loss, loader, bank, gallery=gallery, split=split, events=events)
            if distributed and dist.is_initialized():
                rows = _gather_rows(rows)
            if len(rows["sample_ids"]) == 0:
                raise DataError("there is nothing to evaluate", where=f"split {split}", expected="at least one pair", got=0)
            order = np.argsort(rows["sample_ids"], kind="stable")
            rows = {name: values[order] for name, values in rows.items()}
            pictures = gallery.arrays(model, sample_ids=rows["sample_ids"], mean=pixels.mean, std=pixels.std) if pixels is not None else {}
    finally:
        model.train(training)
    classes = caption_classes(bank) if classes is None else classes
    metrics, per_class = _metrics(rows, bank, classes=classes)
    metrics = {"split": split, "num_pairs": len(order), "num_captions": bank.num_captions} | metrics
    kept = {name: rows[name] for name in ("ranks", "caption_ids", "sample_ids", "top_ids", "top_scores")}
    return Evaluation(metrics=metrics | {"seconds": time.perf_counter() - started}, arrays=kept | per_class | pictures)


def caption_classes(bank: CaptionBank) -> Int[np.ndarray, "captions sides"] | None:
    """Class of each tile by caption id, of a bank made from a template; None for free captions."""
    if bank.free_captions:
        return None
    return np.stack(np.divmod(np.arange(bank.num_captions), len(bank.class_names)), axis=1)


def _rows(
    model: nn.Module, loss: ContrastiveLoss, loader: PairBatches, bank: CaptionBank, *, gallery: Gallery, split: str, events: EventLog
) -> dict[str, np.ndarray]:
    """Numbers per pair of this process, in the loader's order."""
    device = loss.bank.device
    swap_ids = bank.swap_ids.to(device)
    parts: list[dict[str, np.ndarray]] = []
    with events.progress(f"evaluating {split}", len(loader), unit="batches") as advance:
        for batch in loader:
            if batch.valid.any():
                image_features = model(batch.images)[batch.valid]
                caption_ids = batch.caption_ids[batch.valid]
                part = _rank(image_features, caption_ids, loss=loss, swap_ids=swap_ids)
                part["sample_ids"] = batch.sample_ids[batch.valid].cpu().numpy().astype(np.int64)
                gallery.offer(batch.images, batch.valid, ranks=part["ranks"], sample_ids=part["sample_ids"])
                parts.append(part)
            advance(1)
    empty = _rank(loss.bank[:0], torch.zeros(0, dtype=torch.int64, device=device), loss=loss, swap_ids=swap_ids)
    parts.append(empty | {"sample_ids": np.zeros(0, dtype=np.int64)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rank(
    image_features: Float[Tensor, "batch dim"],
    caption_ids: Int[Tensor, " batch"],
    *,
    loss: ContrastiveLoss,
    swap_ids: Int[Tensor, " captions"],
) -> dict[str, np.ndarray]:
    """What is kept of each pair."""
    captions = len(loss.bank)
    if caption_ids.numel() and not 0 <= int(caption_ids.min()) <= int(caption_ids.max()) < captions:
        raise DataError(
            "a caption id is outside the caption bank", where="the pairs", expected=f"0..{captions - 1}", got=int(caption_ids.max())
        )
    scale = loss.scale
    stats = ops.bank_stats(image_features, loss.bank, scale, caption_ids, groups=loss.groups)
    scores, top_ids = ops.bank_topk(image_features, loss.bank, k=min(TOP_CAPTIONS, captions))
    both = ops.pair_scores(image_features, loss.bank, torch.stack([caption_ids, swap_ids[caption_ids]], dim=1))
    true, swapped = both.unbind(dim=1)
    values = {
        "ranks": pessimistic_ranks(stats.greater.cpu().numpy(), stats.equal.cpu().numpy()).astype(np.int32),
        "caption_ids": caption_ids.cpu().numpy().astype(np.int32),
        "top_ids": top_ids.cpu().numpy().astype(np.int32),
        "top_scores": scores.float().cpu().numpy(),
        "nll": (stats.lse - scale * true).double().cpu().numpy(),
        # Not `swapped >= true`: a NaN score must not count as telling the two apart.
        "swap_wins": (~(true > swapped)).cpu().numpy(),
    }
    return values


def _metrics(
    rows: dict[str, np.ndarray], bank: CaptionBank, *, classes: np.ndarray | None
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The metrics by name, and correct and total pairs by class."""
    groups, swap_ids, caption_ids = bank.groups.numpy(), bank.swap_ids.numpy(), rows["caption_ids"]
    same_size = np.bincount(groups, minlength=len(groups))[groups]
    metrics = ranking_metrics(rows["ranks"].astype(np.int64), positives=same_size[caption_ids])
    metrics["swap_rate"] = swap_rate(rows["swap_wins"], counted=groups[swap_ids[caption_ids]] != groups[caption_ids])
    metrics["loss"] = float(rows["nll"].mean())
    if classes is None:
        return metrics, {}
    arrays, per_class = {}, {}
    sides = side_accuracy(classes[rows["top_ids"][:, 0]], classes[caption_ids], num_classes=int(classes.max()) + 1)
    for name, (correct, total) in zip(side_names(len(sides)), sides, strict=True):
        metrics[f"{name}_top1"] = float(correct.sum() / total.sum())
        per_class[name] = {"correct": correct.tolist(), "total": total.tolist()}
        arrays[f"per_class_{name}_correct"], arrays[f"per_class_{name}_total"] = correct, total
    metrics["per_class"] = per_class
    return metrics, arrays


def _gather_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of all processes, which may have different numbers of them; raw bytes, so nothing is pickled."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    count = torch.tensor([len(rows["sample_ids"])], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(number) for number in counts]
    gathered = {}
    for name, values in rows.items():
        width = values.dtype.itemsize * int(np.prod(values.shape[1:], dtype=np.int64))
        padded = torch.zeros(max(sizes) * width, dtype=torch.uint8, device=device)
        flat = torch.from_numpy(np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8).copy())
        padded[: flat.numel()] = flat.to(device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        data = b"".join(part[: size * width].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True))
        gathered[name] = np.frombuffer(data, dtype=values.dtype).reshape(-1, *values.shape[1:])
    return gathered
