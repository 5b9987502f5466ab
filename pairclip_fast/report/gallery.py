"""Hits and misses to look at: the pictures as data URIs, their best captions, and where the encoder looked."""

from __future__ import annotations

import base64
import dataclasses
import io
import re

import numpy as np

from pairclip_fast.report.classes import class_name
from pairclip_fast.report.data import Evaluation
from pairclip_fast.report.words import shown

GALLERY_LIMIT = 48
"""Cards on the page; each is about 5 kB."""
ATTENTION_LIMIT = 12
ATTENTION_SCALE = 6
"""The overlay is smooth, so it is drawn at this multiple of the picture's size."""
JPEG_QUALITY = 88
"""Of the overlays, which are smooth and large; the pictures themselves are PNG."""
ATTENTION_COLOUR = (255, 120, 0)
PLACEHOLDER = re.compile(r"\{(left|right)\}")


@dataclasses.dataclass(frozen=True)
class CaptionLine:
    """One caption of a card: the two class names, which of them are right, and the score or rank at its end."""

    left: str
    right: str
    left_true: bool
    right_true: bool
    score: str
    place: str


@dataclasses.dataclass(frozen=True)
class Card:
    """One picture with its captions; `lines` ends with the true caption if that is not among the best ones."""

    picture: str
    alt: str
    width: int
    height: int
    rank: int
    hit: bool
    lines: list[CaptionLine]


@dataclasses.dataclass(frozen=True)
class AttentionCard:
    """A picture beside the same picture with the attention laid over it."""

    picture: str
    overlay: str
    alt: str
    width: int
    height: int


def caption_text(template: str, left: str, right: str) -> str:
    """The caption in words. Replaces `{left}` and `{right}` once, never evaluates the template."""
    values = {"left": left, "right": right}
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def png_data_uri(pixels: np.ndarray) -> str:
    """`pixels` (uint8 [H, W, 3]) as a PNG inside a `data:` address; the same bytes for the same pixels."""
    return _data_uri(pixels, "png")


def cards(evaluation: Evaluation, names: list[str], template: str) -> list[Card]:
    """The gallery, misses after hits, both in the order recorded; empty where the run kept no pictures."""
    arrays = evaluation.arrays
    if any(name not in arrays for name in ("gallery_images", "gallery_index", "ranks", "caption_ids", "top_ids")):
        return []
    result = []
    for picture, index in list(zip(arrays["gallery_images"], arrays["gallery_index"], strict=False))[:GALLERY_LIMIT]:
        lines = _lines(evaluation, int(index), names)
        true = next((line for line in lines if line.left_true and line.right_true), None)
        words = caption_text(template, true.left, true.right) if true else "a pair of photos"
        rank = int(arrays["ranks"][index])
        height, width = picture.shape[:2]
        alt = f"{shown(words)}; the true caption has rank {rank:,}"
        result.append(Card(png_data_uri(picture), alt, width, height, rank, rank == 1, lines))
    return sorted(result, key=lambda card: not card.hit)


def attention_cards(evaluation: Evaluation) -> list[AttentionCard]:
    """Attention laid over the first pictures of the gallery; a map of several tiles or heads is averaged."""
    maps, images = evaluation.arrays.get("attention"), evaluation.arrays.get("gallery_images")
    if maps is None or images is None:
        return []
    result = []
    for number, (values, picture) in enumerate(list(zip(maps, images, strict=False))[:ATTENTION_LIMIT], start=1):
        height, width = picture.shape[:2]
        flat = np.asarray(values, dtype=np.float64)
        overlay = _data_uri(_overlay(picture, flat.mean(axis=0) if flat.ndim == 3 else flat), "jpeg")
        result.append(AttentionCard(png_data_uri(picture), overlay, f"picture {number} of the gallery", width, height))
    return result


def _data_uri(pixels: np.ndarray, kind: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format=kind, quality=JPEG_QUALITY)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _lines(evaluation: Evaluation, index: int, names: list[str]) -> list[CaptionLine]:
    top_ids, scores = evaluation.arrays["top_ids"][index], evaluation.arrays.get("top_scores")
    truth = int(evaluation.arrays["caption_ids"][index])
    lines = []
    for place, caption_id in enumerate(top_ids[:5]):
        score = f"{float(scores[index, place]):.3f}" if scores is not None else ""
        lines.append(_line(int(caption_id), truth, names, score=score, place=str(place + 1)))
    if truth not in [int(caption_id) for caption_id in top_ids[:5]]:
        lines.append(_line(truth, truth, names, score="", place=f"{int(evaluation.arrays['ranks'][index]):,}"))
    return lines


def _line(caption_id: int, truth: int, names: list[str], *, score: str, place: str) -> CaptionLine:
    count = max(len(names), 1)
    left, right = divmod(caption_id, count)
    true_left, true_right = divmod(truth, count)
    return CaptionLine(class_name(names, left), class_name(names, right), left == true_left, right == true_right, score, place)


def _overlay(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`picture` greyed, with colour where `values` (any [h, w] grid, scaled to its own range) are high; uint8 [H, W, 3]."""
    height, width = picture.shape[0] * ATTENTION_SCALE, picture.shape[1] * ATTENTION_SCALE
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    weight = _resize((values - low) / (high - low) if high > low else np.zeros_like(values), height, width)[..., None]
    large = picture.repeat(ATTENTION_SCALE, axis=0).repeat(ATTENTION_SCALE, axis=1).astype(np.float64)
    grey = (large @ np.array([0.299, 0.587, 0.114]))[..., None] * 0.75 + 0.25 * large
    mixed = grey * (1.0 - 0.65 * weight) + np.array(ATTENTION_COLOUR) * 0.65 * weight
    pixels: np.ndarray = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
    return pixels


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres aligned, edges repeated."""
    rows = np.clip((np.arange(height) + 0.5) * values.shape[0] / height - 0.5, 0, values.shape[0] - 1)
    columns = np.clip((np.arange(width) + 0.5) * values.shape[1] / width - 0.5, 0, values.shape[1] - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, values.shape[0] - 1), np.minimum(left + 1, values.shape[1] - 1)
    down, across = (rows - top)[:, None], (columns - left)[None, :]
    upper = values[np.ix_(top, left)] * (1 - across) + values[np.ix_(top, right)] * across
    lower = values[np.ix_(bottom, left)] * (1 - across) + values[np.ix_(bottom, right)] * across
    resized: np.ndarray = upper * (1 - down) + lower * down
    return resized
