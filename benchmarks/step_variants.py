"""The training steps that `train_step` compares, and the check that each computes the right loss and gradient.

Ours is the trainer's own. The plain ones are the same modules with torch's own operations in place of ours (attention,
fused normalisation, bank softmax), and torch's default AdamW whatever the preset's optimizer is, which is cheaper than Muon.
The report's run batches of 32 in float32 with in-batch InfoNCE, and its frozen text encoder embeds each batch's captions anew.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from reference_loss import infonce_loss
from step_text import text_tower
from torch import Tensor, nn
from training_rows import reference

from pairclip_fast.data.loader import Batch
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models import attention, convolution, fused_norm, tower
from pairclip_fast.models.build import build_model
from pairclip_fast.train.loop import Trainee, train_step
from pairclip_fast.train.setup import Parts

REPORT_BATCH = 32
REPORT_TEMPERATURE = 0.07
VERIFIED_PAIRS = 8
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative."""
GRADIENT_TOLERANCE = {"fp32": 2e-2, "bf16": 2.5e-1, "fp16": 5e-2}
"""Of the whole gradient, relative in the 2-norm. Rounding decides which of two nearly equal pixels is the larger, and the gradient
of max pooling then goes to another place: with few pairs that alone makes 4e-3 in float32, and 2e-1 in plain torch's bfloat16."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""From image features and caption ids."""


class Step(Protocol):
    """One way to train."""

    name: str
    precision: str
    batch_size: int
    encoder: nn.Module

    def loss(self, batch: Batch) -> Tensor: ...
    def expected(self, features: Tensor, caption_ids: Tensor) -> Tensor: ...
    def step(self, batch: Batch) -> object: ...


class OurStep:
    """`train_step` of the trainer."""

    name = "ours"

    def __init__(self, trainee: Trainee, parts: Parts) -> None:
        self.trainee, self.parts = trainee, parts
        self.encoder, self.batch_size = trainee.module.encoder, parts.config.train.batch_size
        self.precision: str = parts.precision.name
        self._steps = 0

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.trainee.module(batch.images, batch.caption_ids, batch.valid)
        return loss

    def expected(self, features: Tensor, caption_ids: Tensor) -> Tensor:
        return reference(features, self.parts.bank, caption_ids, config=self.parts.config.loss)

    def step(self, batch: Batch) -> object:
        self._steps += 1
        return train_step(self.trainee, batch, step=self._steps)


@dataclasses.dataclass(kw_only=True)
class PlainStep:
    """What one writes first: forward, loss, backward, AdamW."""

    name: str
    encoder: nn.Module
    batch_size: int
    of_features: Loss
    expected: Loss
    precision: str = "fp32"
    parameters: Sequence[Tensor] = ()
    """Trained beside the encoder's."""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([*self.encoder.parameters(), *self.parameters], lr=1e-4)

    def loss(self, batch: Batch) -> Tensor:
        with plain_operations(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.encoder(batch.images)
        return self.of_features(features.float(), batch.caption_ids)

    def step(self, batch: Batch) -> object:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Inside, models take torch's operations where they have their own."""
    ours = [(attention, "_own_gradient_wins"), (convolution, "_ours_wins"), (fused_norm, "takes"), (tower, "takes")]
    with contextlib.ExitStack() as patches:
        for module, question in ours:
            patches.enter_context(mock.patch.object(module, question, return_value=False))
        yield


def plain_steps(ours: OurStep) -> list[PlainStep]:
    """Plain eager training of the same model with the same loss, with and without autocast."""
    return [_plain(ours, precision) for precision in ("fp32", "bf16")]


def _plain(ours: OurStep, precision: str) -> PlainStep:
    base = copy.deepcopy(ours.trainee.module.loss)
    assert isinstance(base, ContrastiveLoss)

    def loss(features: Tensor, caption_ids: Tensor) -> Tensor:
        if base.config.kind == "infonce" or base.groups is not None:
            own: Tensor = base(features, caption_ids)
            return own
        return F.cross_entropy(base.scale * features @ base.bank.T, caption_ids, label_smoothing=base.config.label_smoothing)

    return PlainStep(
        name="eager" if precision == "fp32" else "autocast",
        encoder=copy.deepcopy(ours.encoder),
        batch_size=ours.batch_size,
        of_features=loss,
        expected=ours.expected,
        precision=precision,
        parameters=list(base.parameters()),
    )


def report_steps(parts: Parts, *, events: EventLog) -> tuple[list[PlainStep], str]:
    """The report's way of training the preset's image tower, with its text encoder in the loop and without; and that encoder's name."""
    label, embed, dim = text_tower(events=events)
    captions = parts.bank.captions
    manifest = parts.manifest
    encoder = build_model(parts.config.model, tiles=manifest.tiles, tile_size=(manifest.tile_height, manifest.tile_width), dim=dim)
    table: dict[int, Tensor] = {}

    def embedded(caption_ids: Tensor) -> Tensor:
        return embed([captions[i] for i in caption_ids.tolist()])

    def remembered(caption_ids: Tensor) -> Tensor:
        missing = torch.tensor([i for i in caption_ids.tolist() if i not in table], dtype=torch.int64)
        if len(missing):
            table.update(zip(missing.tolist(), embedded(missing), strict=True))
        return torch.stack([table[i] for i in caption_ids.tolist()])

    def way(name: str, features_of: Callable[[Tensor], Tensor]) -> PlainStep:
        return PlainStep(
            name=name,
            encoder=copy.deepcopy(encoder),
            batch_size=REPORT_BATCH,
            of_features=lambda features, caption_ids: _infonce(features, features_of(caption_ids)),
            expected=lambda features, caption_ids: _expected_infonce(features, features_of(caption_ids).double()),
        )

    return [way("report", embedded), way("report, image tower only", remembered)], label


def _infonce(features: Tensor, captions: Tensor) -> Tensor:
    logits = features @ captions.T / REPORT_TEMPERATURE
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _expected_infonce(features: Tensor, captions: Tensor) -> Tensor:
    """The report lets identical captions of a batch compete: to the definition they are all different."""
    own = torch.arange(len(features))
    return infonce_loss(features, captions, own, groups=own, scale=1 / REPORT_TEMPERATURE)


def verify(step: Step, batch: Batch) -> tuple[float, float]:
    """Relative errors of loss and whole gradient of a few pairs, to a float64 copy of the model and the loss by definition.

    Raises:
        NumericsError: one is larger than the precision explains.
    """
    few: dict[str, Any] = {name: getattr(batch, name)[:VERIFIED_PAIRS] for name in ("images", "caption_ids", "sample_ids", "valid")}
    batch = dataclasses.replace(batch, **few)
    exact = copy.deepcopy(step.encoder).double().train()
    step.encoder.train()
    loss, truth = step.loss(batch), step.expected(exact(batch.images.double()), batch.caption_ids)
    gradients, right = (_gradient(value, model) for value, model in ((loss, step.encoder), (truth, exact)))
    off = float((gradients - right).norm() / right.norm())
    wrong = float((loss.detach() - truth.detach()).abs() / truth.detach().abs())
    most_wrong, most_off = LOSS_TOLERANCE[step.precision], GRADIENT_TOLERANCE[step.precision]
    if not (wrong <= most_wrong and off <= most_off):
        raise NumericsError(
            f"{step.name}: not the loss and gradient of float64: nothing was timed",
            expected=f"relative errors up to {most_wrong:.0e} and {most_off:.0e}",
            got=f"{wrong:.1e} and {off:.1e}",
        )
    return wrong, off


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """All gradients of the model's parameters in one vector."""
    wanted = [one for one in model.parameters() if one.requires_grad]
    return torch.cat([one.double().flatten() for one in torch.autograd.grad(loss, wanted)])
