"""Evaluation end to end on stand-in models whose answers are known, against a brute-force oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairclip_fast.config import LossConfig, TileViTConfig
from pairclip_fast.errors import DataError
from pairclip_fast.evaluate import Evaluation, PixelStatistics, caption_classes, evaluate
from pairclip_fast.events import EventLog
from pairclip_fast.gallery import Gallery, denormalise
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import build_model
from pairclip_fast.text.bank import CaptionBank

NAMES, PAIRS, DIM = ("ant", "bee", "cat", "dog"), 37, 6
PIXELS = PixelStatistics(mean=(100.0, 120.0, 140.0), std=(50.0, 60.0, 70.0))


@dataclasses.dataclass
class Batch:
    images: Tensor
    caption_ids: Tensor
    sample_ids: Tensor
    valid: Tensor


class Batches:
    """All pairs in a given order; the last batch is filled up with rows that must not count."""

    def __init__(self, images: Tensor, caption_ids: Tensor, *, batch_size: int, order: Tensor | None = None) -> None:
        self.images, self.caption_ids, self.batch_size = images, caption_ids, batch_size
        self.order = torch.arange(len(images)) if order is None else order

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.order), self.batch_size):
            chosen = self.order[start : start + self.batch_size]
            missing = self.batch_size - len(chosen)
            ids = torch.cat([chosen, chosen[:1].expand(missing)])
            yield Batch(self.images[ids], self.caption_ids[ids], ids, torch.arange(self.batch_size) < len(chosen))


class Reader(nn.Module):
    """Features written into the pictures: the first pixels of the first channel."""

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(images[:, 0, 0, :DIM], dim=-1)


def bank(names: tuple[str, ...] = NAMES, *, repeat: bool = False) -> CaptionBank:
    features = F.normalize(torch.randn(len(names) ** 2, DIM, generator=torch.Generator().manual_seed(7)), dim=-1)
    if repeat:
        features[5], features[9] = features[2], features[2]
    return CaptionBank(
        text_features=features, encoder="hashed", model="x", digest="0" * 64, template="{left} and {right}", class_names=names
    )


def problem(captions: CaptionBank, *, noise: float, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    caption_ids = torch.randint(0, captions.num_captions, (pairs,), generator=generator)
    images = torch.randn(pairs, 3, 8, 16, generator=generator)
    images[:, 0, 0, :DIM] = captions.text_features[caption_ids] + noise * torch.randn(pairs, DIM, generator=generator)
    return images, caption_ids


def run(
    captions: CaptionBank, images: Tensor, caption_ids: Tensor, *, batch_size: int = 8, order: Tensor | None = None, **options: object
) -> Evaluation:
    loss = ContrastiveLoss(LossConfig(), bank=captions.text_features, groups=captions.groups)
    batches = Batches(images, caption_ids, batch_size=batch_size, order=order)
    settings: dict[str, object] = {"split": "val", "events": EventLog(None, console=False), "pixels": PIXELS, "gallery_size": 6} | options
    return evaluate(settings.pop("model", Reader()), loss, batches, captions, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("repeat", [False, True])
def test_everything_against_brute_force(repeat: bool) -> None:
    captions = bank(repeat=repeat)
    images, caption_ids = problem(captions, noise=0.5)
    result = run(captions, images, caption_ids)
    scores = (Reader()(images).double() @ captions.text_features.double().T).numpy()
    groups, ids = captions.groups.numpy(), caption_ids.numpy()
    ranks = np.array(
        [1 + sum(s >= row[t] and groups[j] != groups[t] for j, s in enumerate(row)) for row, t in zip(scores, ids, strict=True)]
    )
    metrics, arrays = result.metrics, result.arrays
    assert arrays["ranks"].tolist() == ranks.tolist()
    assert metrics["top1"] == pytest.approx((ranks == 1).mean())
    assert metrics["mrr"] == pytest.approx((1 / ranks).mean())
    best = arrays["top_ids"][:, 0]
    assert (scores[np.arange(PAIRS), best] >= scores.max(axis=1) - 1e-6).all()
    assert metrics["left_top1"] == pytest.approx((best // 4 == ids // 4).mean())
    assert metrics["right_top1"] == pytest.approx((best % 4 == ids % 4).mean())
    swaps = ids % 4 * 4 + ids // 4
    distinct = groups[swaps] != groups[ids]
    wins = scores[np.arange(PAIRS), swaps] >= scores[np.arange(PAIRS), ids]
    assert metrics["swap_rate"] == pytest.approx(wins[distinct].mean())
    assert 0 < distinct.sum() < PAIRS
    assert arrays["per_class_left_total"].tolist() == np.bincount(ids // 4, minlength=4).tolist()
    assert arrays["per_class_right_correct"].sum() == round(metrics["right_top1"] * PAIRS)  # type: ignore[operator]
    logits = torch.from_numpy(scores) / 0.07
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, caption_ids)), rel=1e-5)


def test_the_contract() -> None:
    captions = bank()
    result = run(captions, *problem(captions, noise=0.3))
    required = {
        "split",
        "num_pairs",
        "num_captions",
        "top1",
        "top10",
        "top100",
        "mrr",
        "median_rank",
        "left_top1",
        "right_top1",
        "swap_rate",
        "seconds",
    }
    assert required <= set(result.metrics)
    assert (result.metrics["split"], result.metrics["num_pairs"], result.metrics["num_captions"]) == ("val", PAIRS, 16)
    json.dumps(result.metrics, allow_nan=False)
    arrays = result.arrays
    assert arrays["ranks"].dtype == arrays["caption_ids"].dtype == np.int32
    assert arrays["sample_ids"].tolist() == list(range(PAIRS))
    assert arrays["top_ids"].shape == arrays["top_scores"].shape == (PAIRS, 5)
    assert all(array.dtype != object for array in arrays.values())


def test_batch_size_and_order_do_not_matter() -> None:
    captions = bank()
    images, caption_ids = problem(captions, noise=0.5)
    first = run(captions, images, caption_ids, batch_size=PAIRS)
    for batch_size, order in ((1, None), (5, torch.randperm(PAIRS)), (64, None)):
        other = run(captions, images, caption_ids, batch_size=batch_size, order=order)
        for name in set(first.metrics) - {"seconds", "loss"}:
            assert other.metrics[name] == first.metrics[name], name
        assert np.array_equal(other.arrays["ranks"], first.arrays["ranks"])
        assert np.array_equal(other.arrays["top_ids"], first.arrays["top_ids"])


def test_a_perfect_and_a_collapsed_model() -> None:
    captions = bank()
    images, caption_ids = problem(captions, noise=0.0)
    perfect = run(captions, images, caption_ids).metrics
    assert (perfect["top1"], perfect["left_top1"], perfect["right_top1"], perfect["swap_rate"]) == (1.0, 1.0, 1.0, 0.0)

    class Collapsed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), DIM)

    collapsed = run(captions, images, caption_ids, model=Collapsed()).metrics
    assert (collapsed["top1"], collapsed["top10"], collapsed["median_rank"], collapsed["swap_rate"]) == (0.0, 0.0, 16.0, 1.0)

    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), DIM), torch.nan)

    diverged = run(captions, images, caption_ids, model=Diverged()).metrics
    assert (diverged["top1"], diverged["top10"], diverged["swap_rate"]) == (0.0, 0.0, 1.0)


def test_gallery_shows_hits_and_misses_as_they_were() -> None:
    captions = bank()
    images, caption_ids = problem(captions, noise=0.5)
    result = run(captions, images, caption_ids, order=torch.randperm(PAIRS))
    chosen = result.arrays["gallery_index"]
    assert len(chosen) == 6
    assert (result.arrays["ranks"][chosen] == 1).tolist() == [True] * 3 + [False] * 3
    assert np.array_equal(result.arrays["gallery_images"], denormalise(images[chosen], mean=PIXELS.mean, std=PIXELS.std))
    assert "attention" not in result.arrays
    assert "gallery_images" not in run(captions, images, caption_ids, pixels=None).arrays
    assert len(run(captions, *problem(captions, noise=0.0)).arrays["gallery_index"]) == 6


def test_gallery_memory_is_bounded() -> None:
    gallery = Gallery(4)
    for step in range(10):
        gallery.offer(
            torch.zeros(16, 3, 4, 4), torch.ones(16, dtype=torch.bool), ranks=np.arange(1, 17), sample_ids=np.arange(16) + 16 * step
        )
    assert sum(len(kept) for kept in gallery._kept.values()) <= 8
    assert len(gallery.chosen()) == 4


def test_denormalise_inverts_the_loaders_normalisation() -> None:
    pixels = torch.randint(0, 256, (2, 4, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor(PIXELS.mean), torch.tensor(PIXELS.std)
    images = ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
    assert np.array_equal(denormalise(images, mean=PIXELS.mean, std=PIXELS.std), pixels.numpy())


def test_attention_of_the_gallery() -> None:
    captions = bank()
    model = build_model(
        TileViTConfig(width=8, depth=2, heads=2, mlp_width=8, stem_width=2, patch_size=2), tiles=2, tile_size=(8, 8), dim=DIM
    )
    result = run(captions, *problem(captions, noise=0.5), model=model.train())
    assert result.arrays["attention"].shape == (6, 2, 4, 8)
    np.testing.assert_allclose(result.arrays["attention"].sum(axis=(2, 3)), 2.0, rtol=1e-5)
    assert model.training


def test_a_failure_leaves_the_model_in_its_mode() -> None:
    captions, model = bank(), Reader().train()
    images, _ = problem(captions, noise=0.5)
    with pytest.raises(DataError, match="outside the caption bank"):
        run(captions, images, torch.full((PAIRS,), 16), model=model)
    assert model.training
    with pytest.raises(DataError, match="nothing to evaluate"):
        run(captions, images[:0], torch.zeros(0, dtype=torch.int64))


def test_free_captions_have_no_sides() -> None:
    texts = tuple(f"caption {i}" for i in range(16))
    captions = dataclasses.replace(bank(), class_names=(), template="", free_captions=texts)
    metrics = run(captions, *problem(captions, noise=0.3)).metrics
    assert caption_classes(captions) is None
    assert "left_top1" not in metrics
    assert metrics["swap_rate"] is None


def test_autocast_does_not_touch_the_ranking() -> None:
    captions = bank()
    images, caption_ids = problem(captions, noise=0.5)
    results = []
    for context in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        with context:
            results.append(run(captions, images, caption_ids))
    assert np.array_equal(results[0].arrays["ranks"], results[1].arrays["ranks"])
    assert results[0].metrics["loss"] == results[1].metrics["loss"]
