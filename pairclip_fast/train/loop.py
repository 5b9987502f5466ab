"""The training step and the epoch around it: nothing here logs, saves, or knows the device.

The laps say which phase has just ended; what they are added up to is the time ledger's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pairclip_fast.config import OptimizerConfig
from pairclip_fast.data.loader import Batch
from pairclip_fast.telemetry.time_ledger import TimeLedger
from pairclip_fast.train.device import Placement
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.ema import Ema
from pairclip_fast.train.guard import FiniteGuard
from pairclip_fast.train.precision import Precision
from pairclip_fast.train.progress import Progress
from pairclip_fast.train.resizing import Resizer


class LossModule(nn.Module):
    """Image encoder and loss as one module, so that data parallelism and averaging cover `logit_scale` too."""

    def __init__(self, encoder: nn.Module, loss: nn.Module, *, precision: Precision) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.precision = precision
        self.encode: Callable[[Tensor], Tensor] = encoder.__call__
        """The encoder's forward pass, compiled or not."""
        self.encoded: Callable[[], None] = nothing
        """Called between encoder and loss."""

    @property
    def logit_scale(self) -> float:
        """In log space, clamped as the loss uses it."""
        scale: Tensor = self.loss.scale  # type: ignore[assignment]
        return float(scale.detach().log())

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        caption_ids: Int[Tensor, " b"],
        valid: Tensor,
        partner_caption_ids: Int[Tensor, " b"] | None = None,
        mix_weight: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss over the valid pairs; it is summed in float32, see `Precision.loss_dtype` for what it multiplies."""
        with self.precision.autocast():
            image_features = self.encode(images)
        self.encoded()
        mixed = {"partner_caption_ids": partner_caption_ids, "mix_weight": mix_weight}
        loss: Tensor = self.loss(image_features.float(), caption_ids, valid=valid, **mixed)
        return loss


def nothing() -> None:
    """Do nothing."""


@dataclasses.dataclass(kw_only=True)
class Trainee:
    """All that a step reads and changes."""

    module: LossModule
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    schedule: Callable[[int], float]
    placement: Placement
    processes: Processes
    scaler: torch.amp.GradScaler
    guard: FiniteGuard
    ledger: TimeLedger = dataclasses.field(default_factory=TimeLedger)
    ema: Ema | None = None
    resizer: Resizer | None = None
    compiled: bool = False
    """Whether `module.encode` is."""
    parallel: nn.Module | None = None
    """`module` wrapped for data parallelism, if there is more than one process."""
    is_whole: bool = True
    """Whether weights, averages and optimizer state are of the same step; not so while an update is being made."""

    def __post_init__(self) -> None:
        # A function and not a bound method: copies of the module (averages, probes) then share the ledger instead of copying it.
        self.module.encoded = lambda: self.ledger.lap("forward")

    @property
    def evaluated(self) -> LossModule:
        """The weights that evaluations and the best checkpoint use: the averaged ones if there are any."""
        module = self.module if self.ema is None else self.ema.module
        assert isinstance(module, LossModule)
        return module

    @contextlib.contextmanager
    def gradient_sync(self, *, last: bool) -> Iterator[None]:
        """Gradients cross the processes only with the last micro-batch of a step."""
        with contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync():  # type: ignore[operator]
            yield


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outcome of a step, still on the device: reading it waits."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]


def micro_batches(batch: Batch, *, count: int) -> list[Batch]:
    """`batch` in `count` consecutive pieces."""
    if count == 1:
        return [batch]

    def piece(number: int) -> Batch:
        return batch.map(lambda tensor: tensor.chunk(count)[number])

    return [piece(number) for number in range(count)]


def train_step(trainee: Trainee, batch: Batch, *, step: int) -> StepResult:
    """One optimizer step from one batch, in micro-batches weighted by their share of valid pairs."""
    optimizer, config, scaler, lap = trainee.optimizer, trainee.config, trainee.scaler, trainee.ledger.lap
    for group in optimizer.param_groups:
        group["lr"] = trainee.schedule(step) * group["lr_ratio"]
    optimizer.zero_grad(set_to_none=True)
    forward = trainee.parallel or trainee.module
    pieces = micro_batches(batch, count=config.accumulate)
    loss = torch.zeros((), device=batch.images.device)
    for number, piece in enumerate(pieces):
        with trainee.gradient_sync(last=number == len(pieces) - 1):
            part = forward(piece.images, piece.caption_ids, piece.valid, piece.partner_caption_ids, piece.mix_weight)
            part = part * (piece.valid.sum() / batch.valid.sum())
            lap("loss")
            scaler.scale(part).backward()
        lap("backward")
        loss += part.detach()
    loss = trainee.processes.mean(loss)

    scaler.unscale_(optimizer)
    parameters = [p for p in trainee.module.parameters() if p.grad is not None]
    grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.clip_norm:
        clip_grads_with_norm_(parameters, config.clip_norm, grad_norm)
    trainee.is_whole = False
    # Not `scaler.step`, which would overrule the guard by its own view of the gradients, and let go of the weights one step later.
    optimizer.found_inf = trainee.guard.inspect(loss, grad_norm, step=step, batch=batch)  # type: ignore[attr-defined]
    optimizer.step()
    scaler.update()
    if trainee.ema is not None:
        trainee.ema.update(trainee.module, step=step)
    trainee.is_whole = True
    lap("optimizer")
    return StepResult(loss=loss, grad_norm=grad_norm)


def train_epoch(trainee: Trainee, loader: Iterable[Batch], progress: Progress, *, after_step: Callable[[Batch, StepResult], bool]) -> bool:
    """Train on what is left of the loader's epoch.

    Args:
        trainee: Model, optimizer and what belongs to them.
        loader: Yields the batches from its cursor to the end of the epoch.
        progress: Counts on.
        after_step: Called with each batch and result; True ends the epoch early.

    Returns:
        Whether `after_step` ended it.
    """
    trainee.module.train()
    lap = trainee.ledger.lap
    for batch in loader:
        lap("wait")
        moved = trainee.placement.move(batch)
        lap("copy")
        if trainee.resizer is not None:
            moved = dataclasses.replace(moved, images=trainee.resizer(moved.images, step=progress.step))
            lap("resize")
        result = train_step(trainee, moved, step=progress.step)
        progress.step += 1
        progress.samples_seen += len(batch.sample_ids) * trainee.processes.world_size
        stop = after_step(moved, result)
        lap("other")
        if stop:
            return True
    return False
