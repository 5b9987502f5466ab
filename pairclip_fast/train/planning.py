"""What a run will cost, said before it starts: parameters, FLOPs, steps, memory, and the time from a short probe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pairclip_fast.config import RunConfig
from pairclip_fast.data.loader import choose_backend
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.events import EventLog
from pairclip_fast.kernels.choice import VARIABLE, Implementation, implementation_of_all
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models import stages, tower
from pairclip_fast.models.encoder import ImageEncoder
from pairclip_fast.telemetry.flops import training_flops_per_pair
from pairclip_fast.telemetry.timing import words_for_seconds
from pairclip_fast.text.bank import CaptionBank
from pairclip_fast.train.accounting import countable
from pairclip_fast.train.compiling import why_eager
from pairclip_fast.train.device import choose_device
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.loop import LossModule, Trainee
from pairclip_fast.train.precision import choose_precision
from pairclip_fast.train.probing import compiled_speed, probe
from pairclip_fast.train.resizing import Phase
from pairclip_fast.train.setup import BANK, Parts, build_trainee, used_bank
from pairclip_fast.train.work import RunWork

FORWARD_SHARE = 1 / 3
"""Of a training step's FLOPs, those of its forward pass: what an evaluation costs per pair."""
ASSUMED_TEXT_DIM = 512
"""Width of CLIP ViT-B's text features."""
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The cost of a run. Time and memory are estimates."""

    num_train: int
    num_val: int
    num_captions: int
    parameters: int
    flops_per_pair: float
    """Training: forward and backward pass, loss included; the mean over the run."""
    work: RunWork
    steps_per_epoch: int
    epochs: int
    total_pflop: float
    eta_s: float
    memory_gib: dict[str, float]
    """Model (with averages and caption bank), loader, activations of one micro-batch, gradients, optimizer state."""
    device: str
    precision: str
    kernels: str
    """Which implementation of the caption-bank operations runs, and why."""
    blocks: str
    """What trains the transformer blocks, and why."""
    stages: str
    """What trains the convolutional stages, and why."""
    loader: str
    compile: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The plan in words."""
        return [
            f"plan: {self.num_train:,} training and {self.num_val:,} validation pairs, {self.num_captions:,} captions",
            f"      {self.parameters:,} parameters, {self.flops_per_pair / 1e9:.3f} GFLOP per pair, {self.total_pflop:.4g} PFLOP in all",
            f"      {self.epochs} epochs of {self.steps_per_epoch:,} steps; {self.precision}; loader {self.loader}; {self.compile}",
            f"      on {self.device}; kernels {self.kernels}",
            f"      transformer blocks {self.blocks}; convolutional stages {self.stages}",
            f"      about {words_for_seconds(self.eta_s)}, {sum(self.memory_gib.values()):.2f} GiB for training (estimates)",
        ]


def make_plan(parts: Parts, trainee: Trainee, *, loader: str, compiled: str, steps_done: int = 0) -> TrainingPlan:
    """The plan of a run or of what is left of it."""
    config, module = parts.config, trainee.module
    work = count_work(parts, module, phases=parts.phases)
    found = probe(parts, trainee, limit=parts.micro_batch)
    num_val = parts.manifest.splits["val"].count if "val" in parts.manifest.splits else 0
    parameters = sum(parameter.numel() for parameter in module.parameters())
    pairs = parts.steps_per_epoch * config.train.batch_size * config.train.epochs
    left = pairs - steps_done * config.train.batch_size
    ranked = num_val * (max(config.train.epochs * left / max(pairs, 1), 0.0) + 1)
    counted = countable(parts, trainee, activations=found.activation_bytes(parts.micro_batch))
    whole = float(training_flops_per_pair(module.encoder, image_shape=parts.image_shape, num_captions=parts.loss_captions))
    kernels = kernels_of(parts, trainee)
    in_torch = compiled.startswith("compiled")
    speed = compiled_speed(parts, trainee, flops_per_pair=work.flops_per_pair[-1]) if trainee.compiled else found.pairs_per_second * whole
    blocks, convolutions = blocks_of(parts, trainee, compiled=in_torch), stages_of(parts, trainee, compiled=in_torch)
    return TrainingPlan(
        num_train=parts.num_train,
        num_val=num_val,
        num_captions=parts.bank.num_captions,
        parameters=parameters,
        flops_per_pair=work.mean,
        work=work,
        steps_per_epoch=parts.steps_per_epoch,
        epochs=config.train.epochs,
        total_pflop=work.until(parts.total_steps) / 1e15,
        eta_s=(work.until(parts.total_steps) - work.until(steps_done)) / (speed * parts.processes.world_size)
        + ranked * FORWARD_SHARE / (found.pairs_per_second * parts.processes.world_size),
        memory_gib={item: size / GIB for item, size in counted.items() if size is not None},
        device=f"{parts.placement.device.type} ({parts.placement.description})",
        precision=f"{parts.precision.name} ({parts.precision.reason})",
        kernels=f"{kernels.name} ({kernels.reason})",
        blocks=f"{blocks.name} ({blocks.reason})",
        stages=f"{convolutions.name} ({convolutions.reason})",
        loader=loader,
        compile=compiled,
    )


def blocks_of(parts: Parts, trainee: Trainee, *, compiled: bool) -> Implementation:
    """What trains the encoder's transformer blocks."""
    found = [part for part in trainee.module.encoder.modules() if isinstance(part, ImageEncoder)]
    return tower.implementation(
        getattr(found[0], "blocks", None),
        device=parts.placement.device,
        autocast=_autocast(parts),
        recompute=parts.config.train.recompute,
        compiled=compiled,
    )


def stages_of(parts: Parts, trainee: Trainee, *, compiled: bool) -> Implementation:
    """What trains the encoder's convolutional stages."""
    return stages.implementation(trainee.module.encoder, device=parts.placement.device, autocast=_autocast(parts), compiled=compiled)


def kernels_of(parts: Parts, trainee: Trainee) -> Implementation:
    """What computes the loss over the captions and their ranks: our own kernels only if they take both."""
    loss = trainee.module.loss
    assert isinstance(loss, ContrastiveLoss)
    return implementation_of_all(parts.placement.device, dtypes=(loss.products, loss.bank.dtype), dim=loss.bank.shape[1])


def _autocast(parts: Parts) -> torch.dtype | None:
    return None if parts.precision.name == "fp32" else parts.precision.dtype


def tell_slower_kernels(kernels: Implementation, *, events: EventLog) -> None:
    """One event if the bank operations are torch's, unless that was asked for."""
    if kernels.name == "torch" and os.environ.get(VARIABLE) != "torch":
        events.fallback("kernels over the caption bank", chosen="torch", reason=kernels.reason)


def tell_slower_blocks(parts: Parts, blocks: Implementation, *, compiled: bool, events: EventLog) -> None:
    """One event if this processor could train the blocks faster than they will be, and nobody asked for that."""
    numbers = _autocast(parts) or torch.float32
    could = parts.placement.device.type == "cpu" and (numbers == torch.bfloat16 or tower.why_not_here(numbers) is None)
    if could and blocks.name == "torch" and not (compiled or parts.config.train.recompute):
        events.fallback("transformer blocks in C++", chosen="torch", reason=blocks.reason)


def count_work(parts: Parts, module: LossModule, *, phases: Sequence[Phase]) -> RunWork:
    """What the steps of a run cost, whose tiles have the sizes of `phases`."""
    flops = {
        shape: float(training_flops_per_pair(module.encoder, image_shape=shape, num_captions=parts.loss_captions))
        for shape in {parts.shape_at(phase) for phase in phases}
    }
    return RunWork(
        batch_size=parts.config.train.batch_size,
        ends=tuple(phase.end for phase in phases),
        flops_per_pair=tuple(flops[parts.shape_at(phase)] for phase in phases),
    )


def dry_plan(config: RunConfig, *, data: Path, manifest: Manifest, run: Path, processes: Processes, events: EventLog) -> TrainingPlan:
    """The plan of a run that is not started: reads the data folder, writes nothing, embeds nothing, needs no other process."""
    parts = parts_on_paper(config, data=data, manifest=manifest, run=run, processes=processes, events=events)
    placement = parts.placement
    backend = choose_backend(config.train.loader, device=placement.device, events=events)
    with torch.random.fork_rng(devices=[placement.device] if placement.is_cuda else []):
        trainee = build_trainee(dataclasses.replace(parts, processes=Processes()))
        reason = why_eager(trainee, setting=config.train.compile, events=events)
        return make_plan(parts, trainee, loader=backend, compiled="compiled" if reason is None else f"eager ({reason})")


def parts_on_paper(
    config: RunConfig, *, data: Path, manifest: Manifest, run: Path, events: EventLog, processes: Processes | None = None
) -> Parts:
    """The parts of a run that is not started, for its plan or for a trial; writes nothing.

    Without a caption bank on disk, the bank's size is taken from the configuration and its features are noise: the cost is
    the same.
    """
    placement = choose_device(config.train.device, events=events)
    placement.configure()
    precision = choose_precision(placement.device, amp=config.train.amp, events=events)
    paths = [path for path in (run / BANK, data / BANK) if path.is_file()]
    bank = CaptionBank.load(paths[0]) if paths else _noise_bank(config, manifest)
    if not paths:
        events.note(f"the captions are not embedded yet: {bank.dim} dimensions assumed")
    if paths and bank.kind == "raw":
        bank = used_bank(bank, config)
    return Parts(
        config=config,
        data=data,
        manifest=manifest,
        bank=bank,
        placement=placement,
        precision=precision,
        processes=processes or Processes(),
    )


def _noise_bank(config: RunConfig, manifest: Manifest) -> CaptionBank:
    dim = min(config.bank.rank, manifest.num_captions - 1) if config.bank.kind == "whiten" else ASSUMED_TEXT_DIM
    noise = torch.randn(manifest.num_captions, dim, generator=torch.Generator().manual_seed(0))
    return CaptionBank(
        text_features=torch.nn.functional.normalize(noise, dim=-1),
        encoder="none",
        model="none",
        digest="",
        template=manifest.template,
        class_names=tuple(manifest.class_names),
    )
