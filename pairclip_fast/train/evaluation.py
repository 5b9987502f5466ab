"""Evaluation as the training rooms use it: which weights, which pairs, and where the result goes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pairclip_fast.data.bad_records import Policy
from pairclip_fast.data.loader import Batch, Loader, make_loader
from pairclip_fast.data.manifest import Manifest, read_manifest
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.evaluate import Evaluation, PixelStatistics, evaluate
from pairclip_fast.events import EventLog
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.storage import write_atomic, write_json
from pairclip_fast.text.bank import CaptionBank
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.loop import LossModule

FOLDER = "evaluations"
DIGITS = 8
"""Of the digest of other data, in the name of a result on it."""
BATCH_PAIRS = 256
"""Pairs per evaluation batch; results do not depend on it."""


@dataclasses.dataclass(frozen=True)
class Renormalised:
    """Batches of one data folder, normalised with the statistics of another: those the model was trained with."""

    loader: Loader
    scale: Tensor
    offset: Tensor

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield dataclasses.replace(batch, images=batch.images * self.scale + self.offset)

    def __len__(self) -> int:
        return len(self.loader)


class UnderAutocast(nn.Module):
    """An encoder that runs in the training's number format; ranking stays in float32."""

    def __init__(self, module: LossModule) -> None:
        super().__init__()
        self.encoder, self.precision = module.encoder, module.precision

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        with self.precision.autocast():
            image_features: Tensor = self.encoder(images)
        return image_features.float()

    def attention_pictures(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch layers rows columns"] | None:
        pictures: Tensor | None = self.encoder.attention_pictures(images)  # type: ignore[operator]
        return pictures


class Evaluator:
    """Ranks the captions for the pairs of one split, with the bank and the pixel statistics of the run.

    With several processes each ranks its share, and all get the result. A result on other data than the run's has another name.

    Args:
        data: Data folder.
        split: `train`, `val` or `test`.
        trained_on: Manifest of the data that the run was trained on.
        bank: The run's bank.
        backend: Which loader.
        device: Where to compute.
        processes: Who shares the work.
        events: Told about fallbacks, shown the progress.
        on_bad_record: `raise`: every record of the split is checked before anything else; otherwise pairs with a bad one are left out.

    Raises:
        BadRecordError: a record is bad, and that is to stop.
        ConfigError: the folder lacks the split.
        DataError: it has other classes, or pictures of another size.
    """

    def __init__(
        self,
        data: Path,
        *,
        split: str,
        trained_on: Manifest,
        bank: CaptionBank,
        backend: str,
        device: torch.device,
        processes: Processes,
        events: EventLog,
        on_bad_record: Policy = "raise",
    ) -> None:
        manifest = read_manifest(data)
        check_fit(manifest, split=split, trained_on=trained_on, bank=bank, where=data)
        policy: Policy = "raise" if on_bad_record == "raise" else "skip"
        if policy == "raise":  # now, rather than after an epoch's training
            with ShardReader(data, split) as reader:
                reader.check(np.arange(len(reader)))
        self.split, self._bank, self._events, self._processes = split, bank, events, processes
        self._digest, own = manifest.digest, manifest.digest == trained_on.digest
        self.name = split if own else f"{split}-{manifest.digest[:DIGITS]}"
        if not own:
            warning = doubt(manifest, trained_on, split=split)
            events.note(f"{data} holds other data than the run's{warning}; the result goes to {FOLDER}/{self.name}.json")
        self._loader = make_loader(
            data,
            split=split,
            batch_size=BATCH_PAIRS * processes.world_size,
            augment=None,
            seed=0,
            backend=backend,
            device=device,
            world_size=processes.world_size,
            rank=processes.rank,
            shuffle=False,
            drop_last=False,
            on_bad_record=policy,
            events=events,
        )
        self._pixels = PixelStatistics(mean=trained_on.mean, std=trained_on.std)
        same = (manifest.mean, manifest.std) == (trained_on.mean, trained_on.std)
        self._batches = self._loader if same else Renormalised(self._loader, *_change(manifest, trained_on, device=device))

    def __call__(self, module: LossModule) -> Evaluation:
        """Evaluate a module's weights; its mode is put back."""
        assert isinstance(module.loss, ContrastiveLoss)
        training = module.training
        self._loader.set_epoch(0)
        self._processes.share_buffers(module)
        try:
            return evaluate(
                UnderAutocast(module.eval()),
                module.loss,
                self._batches,
                self._bank,
                split=self.split,
                events=self._events,
                pixels=self._pixels,
                distributed=self._processes.world_size > 1,
            )
        finally:
            module.train(training)

    def final(self, module: LossModule, *, step: int) -> Evaluation:
        """Evaluate the weights after so many steps for the run folder: the metrics say which weights they are of and which data."""
        evaluation = self(module)
        return dataclasses.replace(evaluation, metrics=evaluation.metrics | {"step": step, "data": self._digest})

    def close(self) -> None:
        """Let go of the loader."""
        self._loader.close()


def _change(data: Manifest, trained_on: Manifest, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and offset, [3, 1, 1] each, from one normalisation to another: (x s + m - m') / s'."""
    (mean, std), (new_mean, new_std) = (
        (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (m.mean, m.std)) for m in (data, trained_on)
    )
    return std / new_std, (mean - new_mean) / new_std


def scalars(metrics: dict[str, object]) -> dict[str, Any]:
    """The metrics that are plain values: what events and checkpoints keep."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}


def check_fit(manifest: Manifest, *, split: str, trained_on: Manifest, bank: CaptionBank, where: Path) -> None:
    """Whether a run can be evaluated on a data folder.

    Raises:
        DataError: another set of classes, or another picture size.
        ConfigError: no such split.
    """
    if tuple(manifest.class_names) != tuple(bank.class_names):
        only_run = [name for name in bank.class_names if name not in manifest.class_names]
        only_data = [name for name in manifest.class_names if name not in bank.class_names]
        raise DataError(
            "the data folder has other class names than the run",
            where=where,
            expected=f"the run's {len(bank.class_names)} classes"
            + (f", among them {', '.join(only_run[:5])}" if only_run else ", in their order"),
            got=f"{len(manifest.class_names)} classes" + (f", among them {', '.join(only_data[:5])}" if only_data else ""),
            fix="evaluate on a folder made from the same classes",
        )
    shape, expected = ((m.tiles, m.tile_height, m.tile_width) for m in (manifest, trained_on))
    if shape != expected:
        raise DataError("the data folder has pictures of another size", where=where, expected=expected, got=shape)
    if split not in manifest.splits:
        raise ConfigError(
            "the data folder has no such split",
            where=where,
            expected=", ".join(manifest.splits),
            got=split,
            fix="choose another --split, or shard again with --test-path or --val-fraction",
        )


def doubt(manifest: Manifest, trained_on: Manifest, *, split: str) -> str:
    """What may be wrong with a result on other data; "" if the run held these images out too, and for tests, which no seed moves."""
    held_out = trained_on.splits.get(split)
    if split == "test" or (held_out is not None and held_out.contents_sha256 == manifest.splits[split].contents_sha256):
        return ""
    return f", and its {split} split may contain images that were trained on"


def write_evaluation(run: Path, evaluation: Evaluation, *, name: str) -> None:
    """Write `evaluations/<name>.json` and `.npz`, each atomically."""
    folder = run / FOLDER
    for key, array in evaluation.arrays.items():
        assert array.dtype != np.dtype(object), f"{key} would be pickled"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **evaluation.arrays)  # type: ignore[arg-type]
    write_atomic(folder / f"{name}.npz", buffer.getvalue())
    write_json(folder / f"{name}.json", evaluation.metrics)
