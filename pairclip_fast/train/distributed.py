"""Several processes as one: torchrun's environment, averaging, and the few decisions that all must take alike.

Each process trains its slice of every global batch; the bank loss needs no gathering of features, since every process
has the whole caption bank. Evaluations are shared likewise; only the first process writes and talks. Decisions that depend on
time or signals are taken by agreement over gloo on the CPU, which does not make the device wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pairclip_fast.errors import ConfigError, EnvironmentLackingError, one_line

AGREEMENT_STEPS = 8
"""Steps between two agreements on signals; one costs about 0.1 ms."""
T = TypeVar("T")


class LostProcessError(EnvironmentLackingError):
    """Another process of the run has ended before its time."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run; one by default."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over all processes."""
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world_size

    def agree(self, value: int) -> int:
        """The largest `value` of any process."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def share(self, value: str) -> str:
        """The first process's `value`, everywhere."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """The first process's buffers, everywhere. Data parallelism shares them before a step, and each process moves its own in it."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until all are here."""
        if self.world_size > 1:
            self.agree(0)

    def wrap(self, module: nn.Module, *, device: torch.device) -> nn.Module | None:
        """`module` with averaged gradients, or None for a single process."""
        if self.world_size == 1:
            return None
        return nn.parallel.DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)

    @contextlib.contextmanager
    def losses_told(self) -> Iterator[None]:
        """Where processes meet: that one of them is gone is an error in our words.

        Raises:
            LostProcessError: in place of the backend's error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise LostProcessError(
                "another process of the run has ended",
                where=f"process {self.rank} of {self.world_size}",
                got=one_line(error),
                fix="see what it said, and continue with --resume",
            ) from error

    def leave(self) -> None:
        """Say good-bye to the others."""
        if self.world_size > 1:
            dist.destroy_process_group()


def started_as_one_of_several() -> bool:
    """Whether the environment has what torchrun tells each of its processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this process speaks for the run: the first of those that torchrun started, or the only one."""
    return not started_as_one_of_several() or int(os.environ["RANK"]) == 0


def join() -> Processes:
    """Join the processes that torchrun started, as its environment variables say; a single process otherwise.

    Raises:
        ConfigError: the variables are incomplete.
    """
    if not started_as_one_of_several():
        return Processes()
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if world_size == 1:
        return Processes(local_rank=local_rank)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            "incomplete torchrun environment", where="environment", got=f"no {', '.join(missing)}", fix="start it with torchrun"
        )
    # Both backends in one group: the device's tensors go over nccl, decisions and CPU training over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", world_size=world_size, rank=rank)
    return Processes(world_size=world_size, rank=rank, local_rank=local_rank)


def local_batch(batch_size: int, *, processes: Processes, accumulate: int) -> int:
    """Pairs per micro-batch of one process.

    Raises:
        ConfigError: the global batch does not divide evenly.
    """
    pieces = processes.world_size * accumulate
    if batch_size % pieces:
        raise ConfigError(
            "the batch does not divide evenly",
            where="train.batch_size",
            expected=f"a multiple of {processes.world_size} processes x {accumulate} micro-batches",
            got=batch_size,
            fix=f"use --batch-size {max(batch_size // pieces, 1) * pieces}",
        )
    return batch_size // pieces
