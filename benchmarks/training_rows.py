"""One measured row of `epoch_time`: the trainer's own parts, verified on one batch, then timed over stretches of steps.

Nothing of the training is copied here: model, loss, optimizer, loader, precision and compilation come from `train.setup`
and its neighbours, and the loop is `train_epoch`. It is fed from a stream that goes on over the end of an epoch and is
stopped after as many steps as a stretch has, so prefetched batches survive from one stretch to the next.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import timing
import torch
from epoch_records import EpochRow
from reference_loss import bank_loss, infonce_loss
from torch import Tensor

from pairclip_fast.config import BankConfig, LossConfig, RunConfig
from pairclip_fast.data.commands import run_shard
from pairclip_fast.data.loader import Batch, Loader
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog
from pairclip_fast.models.build import count_parameters
from pairclip_fast.telemetry.machine import cpu_model
from pairclip_fast.telemetry.memory import GIB
from pairclip_fast.telemetry.memory_ledger import in_gib
from pairclip_fast.telemetry.time_ledger import TimeTotals
from pairclip_fast.telemetry.timing import peak_tflops
from pairclip_fast.text.bank import CaptionBank, bank_for
from pairclip_fast.train.accounting import countable
from pairclip_fast.train.budget import rank_noise
from pairclip_fast.train.compiling import compile_encoder
from pairclip_fast.train.device import choose_device
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.loop import StepResult, Trainee, train_epoch
from pairclip_fast.train.planning import count_work
from pairclip_fast.train.precision import choose_precision
from pairclip_fast.train.probing import PROBE_PAIRS, probe
from pairclip_fast.train.progress import Progress
from pairclip_fast.train.resizing import Phase, Resizer, phases
from pairclip_fast.train.setup import Parts, build_trainee, train_loader, used_bank
from pairclip_fast.train.state import model_tensors

REPEATS = 5
LEAST_REPEATS = 3
LEAST_CUDA_SECONDS = 3.0
"""Of steps that are timed, however long compiling took."""
LEAST_SIZED_STEPS = 10
"""With several sizes of tiles, so that each has about its share."""
WARM_UP_STEPS = 3
VERIFIED_PAIRS = 8
"""Of a batch, for the float64 copy of the model."""
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference of the loss; for bf16 about four units in its last place (2^-7) through the depth of a model."""


class Bench:
    """A small data folder, and the rows measured on it.

    Args:
        folder: Where to write the data; must not exist.
        pairs: Training pairs to make.
        epoch_pairs: Pairs of the epoch whose time is given.
        events: Shown the progress and every fallback.
    """

    def __init__(self, folder: Path, *, pairs: int, epoch_pairs: int, events: EventLog) -> None:
        self.folder, self.epoch_pairs, self.events = folder, epoch_pairs, events
        run_shard(ShardOptions(source="shapes", out=folder, num_pairs=pairs), events=events)
        self.manifest = read_manifest(folder)
        self.raw_bank = bank_for(folder, self.manifest, text_encoder="hashed", events=events)
        self._banks: dict[BankConfig, CaptionBank] = {}

    def measure(self, config: RunConfig, *, budget_s: float | None) -> EpochRow:
        """Verify and time one configuration.

        Args:
            config: As `train` would run it.
            budget_s: Seconds to aim at, or None for one whole epoch.

        Raises:
            NumericsError: the loss is not finite or not that of the reference.
        """
        started = time.monotonic()
        parts = self.parts(config)
        placement = parts.placement
        gc.collect()  # the last row's model, so that the peak memory is this row's
        placement.forget_memory_peak()
        held = placement.memory_reading().reserved
        trainee = build_trainee(parts)
        compiled, compile_s = self._compile(trainee, parts)
        with contextlib.closing(train_loader(parts, events=self.events)) as loader:
            stretches = Stretches(trainee, loader, parts=parts, events=self.events)
            loss, expected = verify(trainee, next(stretches.stream), bank=parts.bank, config=config)
            left_s = None if budget_s is None else budget_s - (time.monotonic() - started)
            if left_s is not None and placement.is_cuda:  # compiling may have taken all of it
                left_s = max(left_s, LEAST_CUDA_SECONDS)
            repeats, steps = stretches.warm_up(budget_s=left_s)
            placement.forget_memory_peak()
            trainee.ledger.restart()
            measured = [stretches.run(steps) for _ in range(repeats)]
            shares = TimeTotals()
            shares.add(trainee.ledger.read())
            backend = loader.backend
            training_peak = placement.memory_reading().peak
        placement.forget_memory_peak()
        rank_noise(trainee, parts)
        evaluation_peak = placement.memory_reading().peak
        flops = count_work(parts, trainee.module, phases=stretches.phases(steps)).mean
        rate = timing.spread(steps * config.train.batch_size / m.wall_s for m in measured)
        return EpochRow(
            machine=placement.description if placement.is_cuda else f"{cpu_model()} ({torch.get_num_threads()} threads)",
            device="cuda" if placement.is_cuda else "cpu",
            preset=config.preset,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            precision=parts.precision.name,
            loader=backend,
            compile=compiled,
            compile_s=compile_s,
            parameters=count_parameters(trainee.module.encoder),
            gflop_per_pair=flops / 1e9,
            repeats=repeats,
            steps_per_repeat=steps,
            extrapolated=budget_s is not None,
            pairs_per_second=rate.median,
            pairs_per_second_low=rate.low,
            pairs_per_second_high=rate.high,
            epoch_pairs=self.epoch_pairs,
            epoch_s=self.epoch_pairs / rate.median,
            epoch_s_low=self.epoch_pairs / rate.high,
            epoch_s_high=self.epoch_pairs / rate.low,
            tflops=rate.median * flops / 1e12,
            peak_tflops=peak_tflops(placement.device, dtype=parts.precision.dtype, synchronise=placement.synchronise),
            data_wait_fraction=shares.shares().get("wait", 0.0),
            time_share={str(phase): share for phase, share in shares.shares().items()},
            cpu_s_per_wall_s=sum(m.cpu_s for m in measured) / sum(m.wall_s for m in measured),
            held_gib=in_gib(held),
            training_peak_gib=in_gib(training_peak),
            evaluation_peak_gib=in_gib(evaluation_peak),
            disk_bytes=sum(tensor.nbytes for tensor in model_tensors(trainee).values()),
            counted_gib=self._counted(parts, trainee),
            loss=loss,
            reference_loss=expected,
        )

    def _compile(self, trainee: Trainee, parts: Parts) -> tuple[str, float]:
        """Compile as `train` would; what came of it, and the seconds it took."""
        started = time.perf_counter()
        images = [(parts.micro_batch, *parts.shape_at(phase)) for phase in parts.phases]
        setting, captions = parts.config.train.compile, parts.bank.num_captions
        compiled = compile_encoder(trainee, setting=setting, images=images, num_captions=captions, events=self.events)
        return compiled, time.perf_counter() - started

    @staticmethod
    def _counted(parts: Parts, trainee: Trainee) -> dict[str, float]:
        """GiB per item that can be counted, the activations from the graphs of a few pairs."""
        found = probe(parts, trainee, limit=PROBE_PAIRS)
        trainee.optimizer.state.clear()  # or the state would count as there from the start
        counted = countable(parts, trainee, activations=found.activation_bytes(parts.micro_batch))
        return {item: size / GIB for item, size in counted.items() if size is not None}

    def parts(self, config: RunConfig) -> Parts:
        """What the configuration trains with, on this machine."""
        placement = choose_device(config.train.device, events=self.events)
        placement.configure()
        return Parts(
            config=config,
            data=self.folder,
            manifest=self.manifest,
            bank=self._bank(config),
            placement=placement,
            precision=choose_precision(placement.device, amp=config.train.amp, events=self.events),
            processes=Processes(),
        )

    def _bank(self, config: RunConfig) -> CaptionBank:
        if config.bank not in self._banks:
            self._banks[config.bank] = used_bank(self.raw_bank, config)
        return self._banks[config.bank]


class Stretches:
    """Stretches of training steps on one endless stream of batches; each is a whole run in small, with all its sizes of tiles."""

    def __init__(self, trainee: Trainee, loader: Loader, *, parts: Parts, events: EventLog) -> None:
        self.trainee, self.loader, self.placement, self.parts, self.events = trainee, loader, trainee.placement, parts, events
        self.stream = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def run(self, steps: int) -> timing.Measurement:
        """Train so many steps."""
        progress = Progress()
        if self.trainee.resizer is not None:
            self.trainee.resizer = Resizer(self.phases(steps), tiles=self.parts.manifest.tiles)

        def after_step(_batch: Batch, _result: StepResult) -> bool:
            if progress.step % self.placement.guard_steps == 0:
                self.trainee.guard.check(events=self.events)
            return progress.step >= steps

        measured = timing.measure(
            lambda: train_epoch(self.trainee, self.stream, progress, after_step=after_step), synchronize=self.placement.synchronise
        )
        self.trainee.guard.check(events=self.events)
        return measured

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """The sizes that so many steps go through."""
        return phases(self.parts.config.train.progressive, total_steps=steps, tile_size=self.parts.tile_size)

    def warm_up(self, *, budget_s: float | None) -> tuple[int, int]:
        """Run a few steps unmeasured; then how many stretches of how many steps fit into `budget_s`."""
        sizes = max(len(self.parts.config.train.progressive), 1)
        if budget_s is None:
            self.run(sizes)
            return 1, len(self.loader)
        first = self.run(sizes)  # allocations, autotuning, the loader's start
        count = WARM_UP_STEPS if first.wall_s * (WARM_UP_STEPS + LEAST_REPEATS + 1) < sizes * budget_s else 1
        warm = self.run(count)
        step_s = warm.wall_s / count
        left = max(budget_s - first.wall_s - warm.wall_s, 0.0)
        repeats = REPEATS if REPEATS * step_s <= left else LEAST_REPEATS
        return repeats, max(int(left / (repeats * step_s)), 1 if sizes == 1 else LEAST_SIZED_STEPS)


def verify(trainee: Trainee, batch: Batch, *, bank: CaptionBank, config: RunConfig) -> tuple[float, float]:
    """The loss of a few pairs as the trainer computes it, and from a float64 copy of the model by definition.

    A compiled model gets the whole batch, and keeps what it would train with: other sizes would be other programs.

    Raises:
        NumericsError: they differ, or are not finite.
    """
    pairs = slice(0, None if trainee.compiled else VERIFIED_PAIRS)
    few = {name: getattr(batch, name)[pairs] for name in ("images", "caption_ids", "sample_ids", "valid")}
    batch = trainee.placement.move(dataclasses.replace(batch, **few))
    module = trainee.module.train()
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.set_grad_enabled(trainee.compiled):
        loss = float(module(batch.images, batch.caption_ids, batch.valid).detach())
    with torch.no_grad():
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        exact = copy.deepcopy(module.encoder).cpu().double().train()
        image_features = exact(batch.images.double().cpu())
    expected = float(reference(image_features, bank, batch.caption_ids.cpu(), config=config.loss))
    if not abs(loss - expected) <= TOLERANCE[module.precision.name] * abs(expected):
        raise NumericsError("the loss is not that of the reference: nothing was timed", where=config.preset, expected=expected, got=loss)
    return loss, expected


def reference(image_features: Tensor, bank: CaptionBank, caption_ids: Tensor, *, config: LossConfig) -> Tensor:
    """The loss that `config` defines, in float64, at the temperature that training starts from."""
    features, scale = bank.text_features.double(), 1.0 / config.temperature
    if config.kind == "infonce":
        return infonce_loss(image_features, features, caption_ids, groups=bank.groups, scale=scale)
    return bank_loss(image_features, features, caption_ids, groups=bank.groups, scale=scale, label_smoothing=config.label_smoothing)
