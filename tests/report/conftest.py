"""A plausible run folder made of thin air: everything a report reads, without training anything and without torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from pairclip_fast.config import load_preset

START = 1_760_000_000.0
COLOURS = {"red": (201, 60, 48), "blue": (52, 96, 190), "green": (58, 140, 74), "amber": (226, 158, 42), "violet": (126, 84, 170)}
SHAPES = ("disc", "square", "ring", "cross", "stripe")


MEMORY = {
    "rows": [
        {"item": "process", "counted_gib": None, "measured_gib": 0.7, "unexplained_gib": None},
        {"item": "model", "counted_gib": 0.09, "measured_gib": 0.1, "unexplained_gib": 0.01},
        {"item": "activations", "counted_gib": 0.5, "measured_gib": 0.52, "unexplained_gib": 0.02},
    ],
    "peak_gib": 1.7,
    "peak_with_evaluation_gib": 1.75,
    "explained_gib": 1.5,
    "unexplained_gib": 0.2,
}
"""What a run tells of its memory after its first epoch."""


@dataclasses.dataclass(frozen=True)
class FakeRun:
    """What the folder is to contain."""

    epochs: int = 12
    steps_per_epoch: int = 90
    finished: bool = True
    splits: tuple[str, ...] = ("val", "test")
    pictures: bool = True
    attention: bool = True
    resumed: bool = True
    class_names: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
    run_name: str = "vit-20261009-101500"
    note: str = "the caption bank was embedded in 3.1 s"


def write_fake_run(parent: Path, options: FakeRun) -> Path:
    """A run folder under `parent`; the same files for the same options."""
    folder = parent / options.run_name
    folder.mkdir(parents=True)
    config = dataclasses.asdict(load_preset("vit"))
    config["train"]["epochs"] = options.epochs
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment()))
    (folder / "manifest.json").write_text(json.dumps(manifest(options)))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(options, config)))
    save_file({"text_features": np.zeros((1, 1), np.float32)}, folder / "captions.safetensors", metadata={"encoder": "minilm-l6-v2"})
    (folder / "evaluations").mkdir()
    for split in options.splits:
        metrics, arrays = evaluation(options, split)
        (folder / "evaluations" / f"{split}.json").write_text(json.dumps(metrics))
        np.savez(folder / "evaluations" / f"{split}.npz", **arrays)
    return folder


def environment() -> dict[str, Any]:
    return {
        "python": "3.11.2",
        "platform": "Linux-6.1-x86_64",
        "cpu": {"model": "Example CPU @ 2.80GHz", "cores": 2, "isa": ["avx2", "avx512f"]},
        "torch": {"version": "2.14.1", "cuda": None, "threads": 2},
        "gpus": [],
    }


def manifest(options: FakeRun) -> dict[str, Any]:
    names = list(options.class_names)
    template = "the photo on the left is {left} and the photo on the right is {right}"
    return {
        "format": 1,
        "source": "shapes",
        "class_names": names,
        "template": template,
        "tiles": 2,
        "splits": {},
        "skipped": [],
        "notes": [],
    }


def events(options: FakeRun, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The log: a first attempt that dies after its fifth epoch, a second that goes on from the fourth."""
    rng = np.random.default_rng(7)
    total = options.epochs * options.steps_per_epoch
    captions = len(options.class_names) ** 2
    flops = 0.153e9
    plan = {"num_train": 45_000, "num_val": 5_000, "num_captions": captions, "parameters": 1_912_345, "flops_per_pair": flops}
    plan |= {"steps_per_epoch": options.steps_per_epoch, "epochs": options.epochs, "device": "cpu", "precision": "fp32", "loader": "dali"}
    found: list[dict[str, Any]] = []
    clock = START

    def emit(event: str, attempt: int, **fields: Any) -> None:
        found.append({"event": event, "time": round(clock, 3), "attempt": attempt, **fields})

    def attempt_steps(attempt: int, first: int, last: int) -> None:
        nonlocal clock
        for step in range(first + 1, last + 1):
            clock += 0.21
            if step % 10 and step % options.steps_per_epoch:
                continue
            done = step / total
            loss = 0.9 + (math.log(captions) - 0.9) * math.exp(-3.4 * done) + 0.12 * rng.standard_normal()
            lr = 1e-3 * min(1.0, done / 0.08) * (0.5 + 0.5 * math.cos(math.pi * done))
            rate = 1210 + 45 * rng.standard_normal()
            emit(
                "step",
                attempt,
                step=step,
                epoch=(step - 1) // options.steps_per_epoch,
                samples_seen=step * 256,
                loss=loss,
                lr=lr,
                logit_scale=math.log(14.3 + 22 * (1 - math.exp(-4 * done))),
                grad_norm=0.9 + 0.25 * abs(rng.standard_normal()),
                pairs_per_second=rate,
                tflops=rate * flops / 1e12,
                peak_share=0.55,
                data_wait_fraction=abs(0.012 + 0.006 * rng.standard_normal()),
                pflop=step * 256 * flops / 1e15,
                eta_s=(total - step) * 0.21,
                memory={"rss_gib": 1.4 + 0.2 * (1 - math.exp(-9 * done)), "peak_rss_gib": 1.7},
                time_s={"wait": 0.02, "forward": 0.6, "backward": 1.2, "optimizer": 0.2, "telemetry": 0.001},
                fill_s=0.7,
            )
            if step == options.steps_per_epoch:
                emit("memory", attempt, device="cpu", **MEMORY)
            if step % options.steps_per_epoch == 0:
                quality = 1 - math.exp(-3.0 * done)
                metrics = {"split": "val", "num_pairs": 2000, "num_captions": captions, "top1": 0.44 * quality**1.6}
                metrics |= {"top10": 0.78 * quality, "top100": min(1.0, 0.95 * quality**0.5)}
                emit("eval", attempt, step=step, epoch=step // options.steps_per_epoch - 1, split="val", metrics=metrics, best=True)
                emit("checkpoint", attempt, step=step, path=f"checkpoints/step-{step:08d}")

    emit("run_started", 1, config=config, plan=plan, resumed_step=0)
    emit("note", 1, message=options.note)
    emit("fallback", 1, what="precision", chosen="fp32", reason="this CPU has no bf16 instructions (AVX512-BF16 or AMX)")
    emit("fallback", 1, what="data", chosen="shapes", reason="no CIFAR-100 found locally and the download failed")
    cut = 4 * options.steps_per_epoch if options.resumed and options.epochs > 5 else 0
    if cut:
        attempt_steps(1, 0, cut + 30)
        clock += 1800
        emit("run_started", 2, config=config, plan=plan, resumed_step=cut)
        emit("fallback", 2, what="precision", chosen="fp32", reason="this CPU has no bf16 instructions (AVX512-BF16 or AMX)")
    attempt = 2 if cut else 1
    attempt_steps(attempt, cut, total)
    if options.finished:
        best = {"step": total, "top1": 0.43}
        emit(
            "finished",
            attempt,
            step=total,
            reason="epochs",
            best=best,
            time_s={"evaluation": 3.0},
            telemetry_share=0.0005,
            seconds=total * 0.21,
            pflop=total * 256 * flops / 1e15,
        )
    return found


def evaluation(options: FakeRun, split: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results of a model that knows the colours better than the shapes."""
    rng = np.random.default_rng(len(split))
    classes = len(options.class_names)
    count = 2000
    truth = rng.integers(0, classes**2, count)
    skill = rng.uniform(0.35, 0.95, classes)
    sides = np.stack([truth // classes, truth % classes], axis=1)
    right = rng.random((count, 2)) < skill[sides]
    wrong = (sides + len(COLOURS) * rng.integers(1, max(2, classes // len(COLOURS)), (count, 2))) % classes
    best = np.where(right, sides, wrong)
    top_ids = np.stack([best[:, 0] * classes + best[:, 1], *(rng.integers(0, classes**2, (4, count)))], axis=1)
    ranks = np.where(right.all(axis=1), 1, 1 + rng.geometric(0.03, count).clip(1, classes**2 - 1))
    second = ~right.all(axis=1) & (rng.random(count) < 0.3)
    ranks[second], top_ids[second, 1] = 2, truth[second]
    scores = np.sort(rng.uniform(0.1, 0.7, (count, 5)), axis=1)[:, ::-1]
    metrics: dict[str, Any] = {"split": split, "num_pairs": count, "num_captions": classes**2}
    metrics |= {f"top{k}": float(np.mean(ranks <= k)) for k in (1, 10, 100)}
    metrics |= {
        "mrr": float(np.mean(1 / ranks)),
        "map": float(np.mean(1 / ranks)),
        "median_rank": float(np.median(ranks)),
        "swap_rate": 0.012,
    }
    metrics |= {"left_top1": float(right[:, 0].mean()), "right_top1": float(right[:, 1].mean()), "seconds": 2.5}
    metrics |= {"precision_at_k": {"5": 0.16}, "recall_at_k": {"5": float(np.mean(ranks <= 5))}}
    arrays: dict[str, Any] = {"ranks": ranks.astype(np.int32), "caption_ids": truth.astype(np.int32), "sample_ids": np.arange(count)}
    arrays |= {"top_ids": top_ids.astype(np.int32), "top_scores": scores.astype(np.float32)}
    for position, side in enumerate(("left", "right")):
        arrays[f"per_class_{side}_total"] = np.bincount(sides[:, position], minlength=classes)
        arrays[f"per_class_{side}_correct"] = np.bincount(sides[right[:, position], position], minlength=classes)
    if options.pictures:
        chosen = np.concatenate([np.flatnonzero(ranks == 1)[:6], np.flatnonzero(ranks > 1)[:6]])
        arrays["gallery_index"] = chosen
        arrays["gallery_images"] = np.stack(
            [np.concatenate([photo(options, side, rng) for side in sides[index]], axis=1) for index in chosen]
        )
        if options.attention:
            arrays["attention"] = np.stack([blob(rng) for _ in range(6)]).astype(np.float32)
    return metrics, arrays


def photo(options: FakeRun, label: int, rng: np.random.Generator) -> np.ndarray:
    """A 32 x 32 picture of a class: its shape in its colour on a noisy ground."""
    y, x = np.mgrid[0:32, 0:32] - rng.uniform(13, 18, 2)[:, None, None]
    distance = np.hypot(x, y)
    masks = {"disc": distance < 10, "square": np.maximum(abs(x), abs(y)) < 9, "ring": abs(distance - 9) < 3}
    masks |= {"cross": np.minimum(abs(x), abs(y)) < 3, "stripe": abs(x + y) < 6}
    colour = list(COLOURS.values())[label % len(COLOURS)]
    mask = masks[SHAPES[label // len(COLOURS) % len(SHAPES)]]
    ground = rng.uniform(120, 220, 3) + rng.normal(0, 9, (32, 32, 3))
    return np.where(mask[..., None], np.array(colour) + rng.normal(0, 9, (32, 32, 3)), ground).clip(0, 255).astype(np.uint8)


def blob(rng: np.random.Generator) -> np.ndarray:
    """Attention of an 8 x 16 token grid, centred somewhere in each tile."""
    y, x = np.mgrid[0:8, 0:16]
    left, right = rng.uniform(2, 6, 2), rng.uniform(2, 6, 2) + np.array([0, 8])
    return sum(np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4) for cy, cx in (left, right)) / 20 + 0.001 * rng.random((8, 16))


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a run folder from `FakeRun` fields."""
    return lambda **fields: write_fake_run(tmp_path, FakeRun(**fields))


@pytest.fixture(scope="session")
def fake_run_in() -> Callable[..., Path]:
    """The same under a folder of the caller's, for runs that several tests share."""
    return lambda parent, **fields: write_fake_run(parent, FakeRun(**fields))
