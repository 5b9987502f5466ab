"""`torch.compile` with a way back: a compiler that is missing or fails costs one event, not the run.

Compiling happens in a warm-up step on noise, before the clock starts, that leaves no trace: gradients are dropped,
buffers and generators put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pairclip_fast.errors import one_line
from pairclip_fast.events import EventLog
from pairclip_fast.models.encoder import recomputes_batch_norm
from pairclip_fast.train.loop import Trainee


def compile_encoder(
    trainee: Trainee, *, setting: str, images: Sequence[tuple[int, int, int, int]], num_captions: int, events: EventLog
) -> str:
    """Compile the encoder's forward and backward pass, once for each shape of images.

    Args:
        trainee: Its module's `encode` is replaced.
        setting: `auto` (on CUDA only), `on` or `off`.
        images: Shapes of the micro-batches.
        num_captions: Caption ids are below this.
        events: Told about a failure, with its reason.

    Returns:
        `compiled` or `eager`, with the reason.

    Raises:
        torch.OutOfMemoryError: a step does not fit; that is no fault of the compiler.
    """
    reason = why_eager(trainee, setting=setting, events=events)
    if reason is not None:
        return f"eager ({reason})"
    module = trainee.module
    eager = module.encode
    # Isolated: the limit of compilations, past which torch runs eagerly and says nothing, is for all models of a process otherwise.
    try:
        settings: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True}
        compiled: Callable[[Tensor], Tensor] = torch.compile(module.encoder.forward, **settings)
        module.encode = compiled
        for shape in images:
            warm_up(trainee, images=shape, num_captions=num_captions)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler raises anything
        # Whatever is no fault of the compiler comes back in the eager step that follows.
        reason = one_line(error)
        torch._dynamo.reset()
        module.encode = eager
        warm_up(trainee, images=images[-1], num_captions=num_captions)
        events.fallback("torch.compile", chosen="eager", reason=reason)
        return "eager (compiling failed)"
    trainee.compiled = True
    return "compiled"


def why_eager(trainee: Trainee, *, setting: str, events: EventLog) -> str | None:
    """Why the encoder is not to be compiled; None if it is. An event if that was not the wish."""
    if setting == "off":
        return "--compile off"
    if setting == "auto" and not trainee.placement.is_cuda:
        return "compiled on CUDA only"
    if recomputes_batch_norm(trainee.module.encoder):
        events.fallback("torch.compile", chosen="eager", reason="batch normalisation whose activations are recomputed cannot be compiled")
        return "activations are recomputed"
    return None


def warm_up(trainee: Trainee, *, images: tuple[int, int, int, int], num_captions: int) -> None:
    """One forward and backward pass on noise; weights, buffers, gradients and generators stay as they were."""
    module, device = trainee.module, trainee.placement.device
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[device] if trainee.placement.is_cuda else []):
        noise = torch.randn(images, device=device)
        ids = torch.arange(images[0], device=device) % num_captions
        module.train()
        try:
            loss = module(noise, ids, torch.ones_like(ids, dtype=torch.bool))
            loss.backward()
            trainee.placement.synchronise()
        finally:
            trainee.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(module.buffers(), buffers, strict=True):
                    buffer.copy_(before)
