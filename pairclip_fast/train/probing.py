"""A short trial before a run: how fast its model trains on this machine, and what its activations take."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from pairclip_fast.train.compiling import warm_up
from pairclip_fast.train.ema import copy_module
from pairclip_fast.train.loop import Trainee
from pairclip_fast.train.setup import Parts

PROBE_PAIRS = 8
"""Pairs of the first, smallest pass."""
PROBE_TRIES = 2
PROBE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a short trial showed."""

    pairs_per_second: float
    activation_bytes_per_pair: float
    fixed_activation_bytes: float
    """Kept whatever the batch: copies of the weights in another format."""

    def activation_bytes(self, pairs: int) -> int:
        """What autograd keeps from the forward to the backward pass of so many pairs."""
        return round(self.fixed_activation_bytes + self.activation_bytes_per_pair * pairs)


def probe(parts: Parts, trainee: Trainee, *, limit: int) -> Probe:
    """Forward and backward passes of a copy of the model on noise, about `PROBE_SECONDS`; touches neither model nor generators.

    Batches double from `PROBE_PAIRS` to `limit`; the best rate counts, since everything else on the machine only slows down.
    Nothing of it is compiled: that takes longer than the trial for every size of batch.
    """
    module = copy_module(trainee.module).train()
    module.encode = module.encoder.__call__  # a compiled function would be the original's, and no copy
    placement, device = parts.placement, parts.placement.device
    generator = torch.Generator(device=device).manual_seed(0)

    def seconds(pairs: int) -> float:
        images = torch.randn((pairs, *parts.image_shape), device=device, generator=generator)
        ids = torch.arange(pairs, device=device) % parts.bank.num_captions
        placement.synchronise()
        started = time.perf_counter()
        module(images, ids, torch.ones_like(ids, dtype=torch.bool)).backward()
        placement.synchronise()
        return time.perf_counter() - started

    with torch.random.fork_rng(devices=[device] if placement.is_cuda else []):
        pairs = min(PROBE_PAIRS, limit)
        # The first passes also pay for allocations.
        few, many = (saved_bytes(functools.partial(seconds, number), module=module) for number in (1, pairs))
        best, tries, started = 0.0, 0, time.perf_counter()
        while tries < PROBE_TRIES or time.perf_counter() - started < PROBE_SECONDS:
            best = max(best, pairs / max(seconds(pairs), 1e-9))
            pairs, tries = min(2 * pairs, limit), tries + 1
    placement.give_back()
    per_pair = (many - few) / (min(PROBE_PAIRS, limit) - 1) if limit > 1 else many
    return Probe(pairs_per_second=best, activation_bytes_per_pair=per_pair, fixed_activation_bytes=few - per_pair)


def compiled_speed(parts: Parts, trainee: Trainee, *, flops_per_pair: float) -> float:
    """FLOP/s of forward and backward passes of the compiled encoder, in the shape of the last phase, for which it is compiled already."""
    shape = (parts.micro_batch, *parts.shape_at(parts.phases[-1]))

    def seconds() -> float:
        started = time.perf_counter()
        warm_up(trainee, images=shape, num_captions=parts.bank.num_captions)
        return time.perf_counter() - started

    return parts.micro_batch * flops_per_pair / min(seconds() for _ in range(PROBE_TRIES))


def saved_bytes(run: Callable[[], object], *, module: torch.nn.Module) -> int:
    """Bytes that autograd keeps from the forward to the backward pass of `run`, weights not counted."""
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    return sum(size for pointer, size in saved.items() if pointer not in weights)
