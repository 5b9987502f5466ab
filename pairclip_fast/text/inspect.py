"""What a caption bank allows: how alike its captions are, and how low a loss against it can get.

The figures say before any training whether the text side is the limit: captions that nearly coincide cannot be told
apart at the temperature that training uses.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from pairclip_fast.text.bank import CaptionBank
from pairclip_fast.text.floor import loss_floor
from pairclip_fast.text.whiten import principal_axes

FLOOR_SAMPLE = 64
"""Captions whose floor is computed: their mean has a standard error of about 1 % and costs seconds."""
CHUNK_ROWS = 1_000


class Inspection(TypedDict):
    """The figures of one bank, JSON-able."""

    kind: str
    num_captions: int
    num_groups: int
    dim: int
    mean_cosine: float
    swap_cosine: float | None
    nearest_cosine: float
    rank: int
    additive_share: float | None
    temperature: float
    label_smoothing: float
    uniform_loss: float
    loss_floor: float
    loss_floor_gap: float
    loss_floor_top1: float
    loss_floor_sample: int


def inspect_bank(bank: CaptionBank, *, temperature: float, label_smoothing: float = 0.0) -> Inspection:
    """All figures of a bank.

    Args:
        bank: Raw or whitened.
        temperature: At which the loss floor is computed.
        label_smoothing: Of the loss whose floor it is.
    """
    features = bank.text_features
    firsts = torch.unique(bank.groups)  # one row per distinct caption
    distinct = features[firsts]
    sample = torch.linspace(0, len(distinct) - 1, min(FLOOR_SAMPLE, len(distinct))).long()
    floor = loss_floor(distinct, sample=sample, scale=1 / temperature, label_smoothing=label_smoothing)
    return Inspection(
        kind=bank.kind,
        num_captions=bank.num_captions,
        num_groups=len(distinct),
        dim=bank.dim,
        mean_cosine=mean_cosine(features),
        swap_cosine=swap_cosine(bank),
        nearest_cosine=nearest_cosine(features),
        rank=len(principal_axes(features)[1]),
        additive_share=additive_share(bank),
        temperature=temperature,
        label_smoothing=label_smoothing,
        uniform_loss=math.log(len(distinct)),
        loss_floor=floor.loss,
        loss_floor_gap=floor.gap,
        loss_floor_top1=floor.top1,
        loss_floor_sample=len(sample),
    )


def mean_cosine(features: Float[Tensor, "n dim"]) -> float:
    """Mean over all pairs of two different rows, from the norm of their sum: no n x n matrix."""
    n = features.shape[0]
    total = features.double().sum(0)
    return float((total @ total - features.double().square().sum()) / (n * (n - 1))) if n > 1 else 1.0


def swap_cosine(bank: CaptionBank) -> float | None:
    """Mean cosine of a caption with its left-right swap, where that is another caption; None if there is none."""
    other = bank.swap_ids != torch.arange(bank.num_captions)
    if not bool(other.any()):
        return None
    cosines = (bank.text_features * bank.text_features[bank.swap_ids]).sum(1)
    return float(cosines[other].double().mean())


def nearest_cosine(features: Float[Tensor, "n dim"]) -> float:
    """Mean over the rows of the cosine with the nearest other row."""
    nearest = []
    for start in range(0, features.shape[0], CHUNK_ROWS):
        scores = features[start : start + CHUNK_ROWS] @ features.T
        scores.diagonal(start).fill_(-1.0)
        nearest.append(scores.amax(1))
    return float(torch.cat(nearest).double().mean())


def additive_share(bank: CaptionBank) -> float | None:
    """Share of the features' variance that a sum of one vector per photo explains; None for free captions, or equal ones.

    The main effects of a two-way analysis of variance (left class, right class). What remains belongs to combinations of
    two names: a head that adds up what it saw in the single photos cannot predict it, so to such a model it is noise.
    """
    if not bank.class_names:
        return None
    classes = len(bank.class_names)
    cells = (bank.text_features.double() - bank.text_features.double().mean(0)).reshape(classes, classes, bank.dim)
    total = float(cells.square().mean((0, 1)).sum())
    additive = sum(float(cells.mean(axis).square().mean(0).sum()) for axis in (0, 1))
    return additive / total if total > 0 else None


def inspection_lines(inspection: Inspection) -> list[str]:
    """The figures, each with a line of words."""
    i = inspection
    smoothing = f", label smoothing {i['label_smoothing']:g}" if i["label_smoothing"] else ""
    swap = "-" if i["swap_cosine"] is None else f"{i['swap_cosine']:.4f}"
    additive = "-" if i["additive_share"] is None else f"{i['additive_share']:.4f}"
    rows = [
        ("captions", f"{i['num_captions']:,}", f"rows of the bank; {i['num_groups']:,} can be told apart at all"),
        ("dimensions", str(i["dim"]), "width of a text feature"),
        ("mean cosine", f"{i['mean_cosine']:.4f}", "of two captions; near 1: all lie in one narrow cone"),
        ("swap cosine", swap, "of a caption with left and right exchanged; near 1: order hardly counts"),
        ("nearest cosine", f"{i['nearest_cosine']:.4f}", "of a caption with the caption most like it"),
        ("rank", str(i["rank"]), "directions in which the captions differ (of the centred bank, to float32 precision)"),
        ("additive share", additive, "of the variance that is the sum of a part per photo; the rest belongs to combinations of names"),
        (
            "loss floor",
            f"{i['loss_floor']:.3f}",
            f"lowest loss any image embedding could reach at temperature {i['temperature']:g}{smoothing}; guessing costs "
            f"{i['uniform_loss']:.3f} (estimate over {i['loss_floor_sample']} captions: proven to be between "
            f"{max(i['loss_floor'] - i['loss_floor_gap'], 0):.3f} and {i['loss_floor']:.3f} for these)",
        ),
        ("top-1 there", f"{i['loss_floor_top1']:.2f}", "share of captions that their loss-optimal embedding ranks first"),
    ]
    title = "raw bank (as the encoder gives it)" if i["kind"] == "raw" else f"whitened bank (centred, rank {i['dim']})"
    return [title, *(f"  {name:<15}{value:>9}  {words}" for name, value, words in rows)]
