"""Staying inside a memory budget: how many pairs at a time, and whether to recompute; found by short trials, not by formulas.

What a step needs beyond its tensors (workspaces, fragments of the allocator) is a third more on a CPU and depends on the
kernels. It does grow evenly with the pairs, so real steps on noise at three small sizes, in this process and on this device,
give the line from which any size follows. On two CPU cores the predictions for `vit`, `fast` and `enhanced` at 64 pairs came
within 5 % of the later peak.

The batch size stays: smaller micro-batches and recomputing give the same gradient of the bank loss up to rounding. On a
GPU the budget is for torch's pool on the device, on a CPU for the process, mapped shards included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from pairclip_fast.config import RunConfig
from pairclip_fast.data.loader import Batch
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.evaluate import TOP_CAPTIONS
from pairclip_fast.events import EventLog
from pairclip_fast.kernels import ops
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.telemetry.memory import GIB
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.evaluation import BATCH_PAIRS, UnderAutocast
from pairclip_fast.train.loop import Trainee, train_step
from pairclip_fast.train.planning import parts_on_paper
from pairclip_fast.train.setup import Parts, build_trainee, train_loader

TRIAL_PAIRS = (8, 16, 32)
"""Pairs of the trials' steps; smaller ones drown in what the allocator keeps anyway."""
TRIAL_STEPS = 3
"""At each size, and evaluation batches: by then the allocator has settled to a few per cent."""
EFFICIENT_PAIRS = 16
"""Micro-batches below this waste more time than recomputing costs (a third of a step); judgement, not measurement."""


RESERVE = 0.10
"""Of the prediction, kept free: fragments of the allocator that come with time, and what trials on a busy machine miss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes that training needs: fixed, and per pair of a micro-batch."""

    fixed: float
    per_pair: float

    def at(self, pairs: int) -> int:
        return round(self.fixed + self.per_pair * pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to train, and the peak it is predicted to need."""

    accumulate: int
    recompute: bool
    predicted: int


def within_budget(
    config: RunConfig, *, data: Path, manifest: Manifest, run: Path, budget: int, processes: Processes, events: EventLog
) -> RunConfig:
    """`config` with the micro-batches and recomputing that keep each process inside `budget` bytes; the fastest way that does.

    Raises:
        EnvironmentLackingError: no way does.
    """
    fits = predictions(config, data=data, manifest=manifest, run=run, processes=processes, events=events)
    share = config.train.batch_size // processes.world_size
    best: Fit | None = None
    for fit in fits:
        best = fit if best is None or fit.predicted < best.predicted else best
        if fit.predicted * (1.0 + RESERVE) <= budget:
            pairs = share // fit.accumulate
            how = f"{pairs} pairs at a time{', activations recomputed' if fit.recompute else ''}"
            events.note(f"memory budget {budget / GIB:.2f} GiB: {how}, {fit.predicted / GIB:.2f} GiB predicted, {RESERVE:.0%} kept free")
            if fit.accumulate > config.optimizer.accumulate and config.loss.kind == "infonce":
                events.note(f"InfoNCE contrasts the pairs of a micro-batch only: {pairs} instead of {share}")
            return dataclasses.replace(
                config,
                optimizer=dataclasses.replace(config.optimizer, accumulate=fit.accumulate),
                train=dataclasses.replace(config.train, recompute=fit.recompute),
            )
    assert best is not None
    least = best.predicted * (1.0 + RESERVE) / GIB
    raise EnvironmentLackingError(
        "the training does not fit into the memory budget",
        where="--memory-budget",
        expected=f"at least {least:.2f} GiB, with {share // best.accumulate} pairs at a time",
        got=f"{budget / GIB:.2f} GiB",
        fix="raise the budget or choose a smaller preset",
    )


def predictions(config: RunConfig, *, data: Path, manifest: Manifest, run: Path, processes: Processes, events: EventLog) -> Iterator[Fit]:
    """Ways to train, the one to be preferred first; a trial is made when the first way that needs it is asked for."""
    parts = parts_on_paper(config, data=data, manifest=manifest, run=run, processes=processes, events=events)
    lines: dict[bool, Line] = {}
    evaluation = 0
    for accumulate, recompute in ways(config, world_size=processes.world_size):
        if recompute not in lines:
            with torch.random.fork_rng(devices=[parts.placement.device] if parts.placement.is_cuda else []):
                lines[recompute], evaluation = trial(parts, recompute=recompute, evaluation=evaluation, events=events)
        pairs = config.train.batch_size // processes.world_size // accumulate
        predicted = max(lines[recompute].at(pairs), evaluation) + mapped_bytes(parts)
        yield Fit(accumulate=accumulate, recompute=recompute, predicted=predicted)


def ways(config: RunConfig, *, world_size: int = 1) -> Iterator[tuple[int, bool]]:
    """(accumulate, recompute) in the order of what they cost: as configured, smaller pieces, recomputing, both to the end."""
    batch, first = config.train.batch_size // world_size, config.optimizer.accumulate
    pieces = [count for count in range(first, batch + 1) if batch % count == 0 and count % first == 0]
    exact = config.loss.kind == "bank"  # pieces change what InfoNCE contrasts; recomputing changes nothing
    cheap = [count for count in pieces if count == first or (exact and batch // count >= EFFICIENT_PAIRS)]
    if not config.train.recompute:
        yield from ((count, False) for count in cheap)
    yield from ((count, True) for count in pieces)


def trial(parts: Parts, *, recompute: bool, evaluation: int, events: EventLog) -> tuple[Line, int]:
    """Real steps and one evaluation batch on noise, beside the real loader.

    Args:
        parts: Configuration and device.
        recompute: Whether the steps recompute.
        evaluation: Peak of an evaluation if it is known, else 0.
        events: Told about fallbacks.

    Returns:
        What steps need, and the peak of an evaluation; both with all that the process holds besides.
    """
    placement, peaks = parts.placement, []
    loader = train_loader(parts, events=events)
    train = dataclasses.replace(parts.config.train, recompute=recompute, batch_size=max(TRIAL_PAIRS))
    optimizer = dataclasses.replace(parts.config.optimizer, accumulate=1)
    several, config = parts.processes.world_size > 1, dataclasses.replace(parts.config, train=train, optimizer=optimizer)
    parts = dataclasses.replace(parts, config=config, processes=Processes())  # the others take no part
    trainee = build_trainee(parts)
    with contextlib.closing(loader):
        batches = iter(loader)
        kept = next(batches)  # and more are made ahead while this one is held, as in training
        train_step(trainee, noise(parts, 2), step=0)  # whatever is loaded with the first step
        for pairs in TRIAL_PAIRS:
            trainee.optimizer.zero_grad(set_to_none=True)
            placement.forget_memory_peak()
            for step in range(TRIAL_STEPS):
                train_step(trainee, noise(parts, pairs), step=step)
            peaks.append(placement.memory_reading().peak or 0)
        if not evaluation:
            placement.forget_memory_peak()
            for _ in range(TRIAL_STEPS):
                rank_noise(trainee, parts)
            evaluation = placement.memory_reading().peak or 0
    # Data parallelism averages gradients in buckets, a second copy of them.
    copied = sum(parameter.nbytes for parameter in trainee.module.parameters() if parameter.requires_grad) if several else 0
    del trainee, batches, kept
    gc.collect()  # a trainee holds itself, by its hook between encoder and loss
    placement.forget_memory_peak()
    per_pair, fixed = statistics.linear_regression(TRIAL_PAIRS, peaks)
    return Line(fixed=fixed + copied, per_pair=max(per_pair, 0.0)), evaluation


def noise(parts: Parts, pairs: int) -> Batch:
    """A batch of so many pairs of noise on the device."""
    device = parts.placement.device
    ids = torch.arange(pairs, device=device)
    return Batch(
        images=torch.randn((pairs, *parts.image_shape), device=device),
        caption_ids=ids % parts.bank.num_captions,
        sample_ids=ids,
        valid=torch.ones_like(ids, dtype=torch.bool),
        epoch=0,
        step=0,
    )


def rank_noise(trainee: Trainee, parts: Parts) -> None:
    """What an evaluation does with one batch."""
    loss = trainee.evaluated.loss
    assert isinstance(loss, ContrastiveLoss)
    batch = noise(parts, BATCH_PAIRS)
    with torch.inference_mode():
        image_features = UnderAutocast(trainee.evaluated).eval()(batch.images)
        ops.bank_stats(image_features, loss.bank, loss.scale, batch.caption_ids, groups=loss.groups)
        ops.bank_topk(image_features, loss.bank, k=min(TOP_CAPTIONS, len(loss.bank)))
    trainee.module.train()


def mapped_bytes(parts: Parts) -> int:
    """Of the shards on a CPU: they are mapped, and resident once an epoch has read them."""
    if parts.placement.is_cuda:
        return 0
    return sum(shard.bytes for name, split in parts.manifest.splits.items() if name in ("train", "val") for shard in split.shards)
