"""From a configuration and a data folder to everything that trains: bank, model, optimizer, loader."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch

from pairclip_fast.config import RunConfig
from pairclip_fast.data.loader import Loader, make_loader
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.events import EventLog
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import PairEncoder, build_model
from pairclip_fast.telemetry.time_ledger import TimeLedger
from pairclip_fast.text.bank import CaptionBank, bank_for
from pairclip_fast.train.device import Placement
from pairclip_fast.train.distributed import Processes, local_batch
from pairclip_fast.train.ema import Ema
from pairclip_fast.train.guard import FP16_STREAK, FiniteGuard
from pairclip_fast.train.loop import LossModule, Trainee
from pairclip_fast.train.optimizer import build_optimizer
from pairclip_fast.train.precision import Precision
from pairclip_fast.train.resizing import Phase, Resizer, phases
from pairclip_fast.train.schedule import learning_rate

BANK = "captions.safetensors"
PREPARED_PAIRS = 512
"""Training pairs from which an encoder computes what it does not train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What every part of a run works with."""

    config: RunConfig
    data: Path
    manifest: Manifest
    bank: CaptionBank
    """The bank as it is used, whitened or not."""
    placement: Placement
    precision: Precision
    processes: Processes

    @property
    def num_train(self) -> int:
        return self.manifest.splits["train"].count

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.config.train.batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def micro_batch(self) -> int:
        """Pairs of one forward pass in one process. Raises ConfigError if the batch does not divide evenly."""
        return local_batch(self.config.train.batch_size, processes=self.processes, accumulate=self.config.optimizer.accumulate)

    @property
    def loss_captions(self) -> int:
        """Captions in the softmax that each pair pays for: all; 0 for InfoNCE, whose products within a batch are below a thousandth."""
        return self.bank.num_captions if self.config.loss.kind == "bank" else 0

    @property
    def tile_size(self) -> tuple[int, int]:
        """Height and width of a tile in the data."""
        return (self.manifest.tile_height, self.manifest.tile_width)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The steps of the run by the size of their tiles."""
        return phases(self.config.train.progressive, total_steps=self.total_steps, tile_size=self.tile_size)

    def shape_at(self, phase: Phase) -> tuple[int, int, int]:
        """Channels, height and width of the pictures that the model sees in a phase."""
        return (3, phase.height, self.manifest.tiles * phase.width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a stacked picture as it is stored, and as evaluations see it."""
        return (3, self.manifest.tile_height, self.manifest.tiles * self.manifest.tile_width)


def used_bank(raw: CaptionBank, config: RunConfig) -> CaptionBank:
    """The bank that the run trains against, from the text encoder's."""
    bank = config.bank
    return raw.whiten(bank.rank, strength=bank.strength, prompt_ensemble=bank.prompt_ensemble) if bank.kind == "whiten" else raw


def run_bank(
    run: Path, *, data: Path, manifest: Manifest, config: RunConfig, text_encoder: str, processes: Processes, events: EventLog
) -> CaptionBank:
    """The bank that travels with the run: as it is used, since whitening again elsewhere could flip the signs of axes.

    The first process makes it, the others read it.
    """
    path = run / BANK
    if processes.is_first and not path.exists():
        used_bank(bank_for(data, manifest, text_encoder=text_encoder, events=events), config).save(path)
    processes.wait()
    return CaptionBank.load(path, fix="start a new run")


def build_module(config: RunConfig, *, manifest: Manifest, bank: CaptionBank, precision: Precision, device: torch.device) -> LossModule:
    """Encoder and loss on `device`; weights are drawn from torch's global generator."""
    encoder = build_model(config.model, tiles=manifest.tiles, tile_size=(manifest.tile_height, manifest.tile_width), dim=bank.dim)
    encoder.encoder.recompute = config.train.recompute
    loss = ContrastiveLoss(config.loss, bank=bank.text_features, groups=bank.groups, products=precision.loss_dtype)
    return LossModule(encoder, loss, precision=precision).to(device)


def build_trainee(parts: Parts) -> Trainee:
    """Model, optimizer, schedule, averages and guard of a run, from its seed.

    Raises:
        ConfigError: the batch does not divide evenly over processes and micro-batches.
    """
    config, placement, processes = parts.config, parts.placement, parts.processes
    _ = parts.micro_batch
    torch.manual_seed(config.train.seed)
    module = build_module(config, manifest=parts.manifest, bank=parts.bank, precision=parts.precision, device=placement.device)
    scaler = parts.precision.gradient_scaler()

    def schedule(step: int) -> float:
        return learning_rate(step, config=config.optimizer, steps_per_epoch=parts.steps_per_epoch, total_steps=parts.total_steps)

    return Trainee(
        module=module,
        optimizer=build_optimizer(module, config=config.optimizer),
        config=config.optimizer,
        schedule=schedule,
        placement=placement,
        processes=processes,
        scaler=scaler,
        guard=FiniteGuard(placement.device, tolerance=FP16_STREAK if scaler.is_enabled() else 0),
        ledger=TimeLedger(mark=placement.mark, between=placement.seconds_between),
        ema=Ema(module, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        resizer=Resizer(parts.phases, tiles=parts.manifest.tiles) if config.train.progressive else None,
        parallel=processes.wrap(module, device=placement.device),
    )


def prepare(parts: Parts, trainee: Trainee, *, events: EventLog) -> None:
    """Let the encoder look at the first training pictures, not augmented; every process sees the same ones."""
    train = parts.config.train
    loader = make_loader(
        parts.data,
        split="train",
        batch_size=min(PREPARED_PAIRS, parts.num_train),
        augment=None,
        seed=train.seed,
        backend=train.loader,
        device=parts.placement.device,
        shuffle=True,
        drop_last=False,
        on_bad_record=train.on_bad_record,
        events=events,
    )
    with contextlib.closing(loader):
        batch = parts.placement.move(next(iter(loader)))
    encoder = trainee.module.encoder
    assert isinstance(encoder, PairEncoder)
    encoder.encoder.prepare(batch.images[batch.valid])


def train_loader(parts: Parts, *, events: EventLog) -> Loader:
    """The loader of the training pairs: this process's slice of every batch."""
    train = parts.config.train
    return make_loader(
        parts.data,
        split="train",
        batch_size=train.batch_size,
        augment=parts.config.augment,
        seed=train.seed,
        backend=train.loader,
        device=parts.placement.device,
        world_size=parts.processes.world_size,
        rank=parts.processes.rank,
        shuffle=True,
        drop_last=True,
        on_bad_record=train.on_bad_record,
        events=events,
    )
