"""The loader: batches in the plan's order from whichever backend, ahead of time, with a state of a few integers.

What every backend must guarantee (same stream, placement independence, exactly once, exact resume) is guaranteed here,
once: a backend only turns ids and parameters into pictures (`backends.executor`). The position is a number of samples of
the global order, so a run may go on with another batch size or world size and still see the same sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.executor import DrawingExecutor, Executor
from pairclip_fast.data.backends.pictures import usable_threads
from pairclip_fast.data.bad_records import BadRecords, Policy
from pairclip_fast.data.mixing import blend
from pairclip_fast.data.parameters import Draw
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.prefetch import Prefetcher
from pairclip_fast.data.recipe import Recipe
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.data.stats import LoaderStats
from pairclip_fast.errors import ConfigError, DataError, EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.native import native

Ints = NDArray[np.int64]
STATE_VERSION = 1
PREFETCH_BATCHES = 2
BACKENDS = ("auto", "native", "dali", "reference")
MAX_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of one step, on the loader's device."""

    images: Float[Tensor, "batch 3 height width"]
    """Normalised, float32 unless the backend was asked for bfloat16; the tiles of a sample side by side."""
    caption_ids: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    """False for padding of a short last batch: leave such rows out of every sum."""
    epoch: int
    step: int
    """Step within the epoch."""
    partner_caption_ids: Int64[Tensor, " batch"] | None = None
    """Caption of the sample mixed into each one; None if nothing is mixed."""
    mix_weight: Float32[Tensor, " batch"] | None = None
    """Share of the own picture and caption, in [0, 1]; the rest is the partner's."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with `change` applied to each tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values)


@runtime_checkable
class Loader(Protocol):
    """Batches of one split."""

    @property
    def stats(self) -> LoaderStats: ...

    @property
    def backend(self) -> str:
        """Which backend fills the batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the position to the end of the epoch; then the position is the start of the next one."""

    def __len__(self) -> int:
        """Steps of a whole epoch."""

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last delivered batch, what it is a position in, and the bad records; under 300 bytes as JSON,
        but for the latter.
        """

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from `state`. Raises DataError if it belongs to other data or another order."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""

    def close(self) -> None:
        """Stop the thread, close the shards. Safe to call twice."""


class PlannedLoader:
    """A `Loader` over any executor."""

    def __init__(
        self,
        executor: Executor,
        *,
        reader: ShardReader,
        plan: Plan,
        augment: AugmentConfig | None,
        device: torch.device,
        bad_records: BadRecords,
    ) -> None:
        self.stats = LoaderStats()
        self.backend = executor.name
        self._executor, self._reader, self._plan, self._augment, self._device = executor, reader, plan, augment, device
        self._fill_drawn = executor.fill_drawn if isinstance(executor, DrawingExecutor) else None  # asked once: it takes 50 us
        self._bad_records = bad_records
        self._recipe = Recipe.of(reader.manifest, bad_records.caption_ids, plan=plan, augment=augment)
        self._epoch, self._cursor = 0, 0
        self._prefetcher: Prefetcher[Batch] | None = None

    def __len__(self) -> int:
        return self._plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self._interrupt()
        prefetcher = self._prefetcher = Prefetcher(self._batches(self._epoch, self._cursor), depth=PREFETCH_BATCHES)
        try:
            while (batch := self._next(prefetcher)) is not None:
                yield batch
            if self._prefetcher is prefetcher:  # else set_epoch, load_state_dict, close or a newer iterator took over
                self._epoch, self._cursor = self._epoch + 1, 0
        finally:
            prefetcher.close()
            if self._prefetcher is prefetcher:
                self._prefetcher = None

    def state_dict(self) -> dict[str, int | str]:
        whole_epoch = self._plan.steps_from(self._cursor) == 0
        position = {"epoch": self._epoch + 1, "cursor": 0} if whole_epoch else {"epoch": self._epoch, "cursor": self._cursor}
        return {"v": STATE_VERSION, **position, **self._identity(), "bad": self._bad_records.state()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        mine = {"v": STATE_VERSION, **self._identity()}
        differing = [key for key, value in mine.items() if state.get(key) != value]
        if differing:
            raise DataError(
                "the loader state belongs to other data or another order",
                where=", ".join(differing),
                expected=", ".join(f"{key}={state.get(key)}" for key in differing) + " (the state)",
                got=", ".join(f"{key}={mine[key]}" for key in differing) + " (this loader)",
                fix="resume with the data folder, seed and augmentation that the run was started with",
            )
        epoch, cursor = state.get("epoch"), state.get("cursor")
        if not (isinstance(epoch, int) and isinstance(cursor, int) and epoch >= 0 and 0 <= cursor <= self._plan.num_samples):
            raise DataError("the loader state is damaged", where="epoch, cursor", got=f"{epoch!r}, {cursor!r}")
        self._interrupt()
        self._bad_records.restore(str(state.get("bad", "")))
        self._epoch, self._cursor = epoch, cursor

    def set_epoch(self, epoch: int) -> None:
        self._interrupt()
        self._epoch, self._cursor = epoch, 0

    def close(self) -> None:
        self._interrupt()
        self._executor.close()
        self._reader.close()

    def _identity(self) -> dict[str, int | str]:
        """What a position is a position in. Batch size and world size are free: the order does not depend on them."""
        augment = json.dumps(None if self._augment is None else dataclasses.asdict(self._augment), sort_keys=True)
        return {
            "data": self._reader.manifest.digest,
            "split": self._reader.split,
            "samples": self._plan.num_samples,
            "seed": self._plan.seed,
            "shuffle": int(self._plan.shuffle),
            "augment": hashlib.sha256(augment.encode()).hexdigest()[:8],
        }

    def _interrupt(self) -> None:
        """End the running iterator, if any: it delivers nothing more and moves nothing."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _next(self, prefetcher: Prefetcher[Batch]) -> Batch | None:
        started, ready = time.perf_counter(), prefetcher.ready
        batch = prefetcher.get()
        if batch is not None:
            self.stats.ready += ready
            self.stats.wait_s += time.perf_counter() - started
            self.stats.batches += 1
            self.stats.samples += self._plan.valid_at(self._cursor)
            # The position counts what was delivered, not what was prefetched.
            self._cursor += self._plan.batch_size
        return batch

    def _batches(self, epoch: int, cursor: int) -> Iterator[Batch]:
        """Runs in the thread of the prefetcher."""
        stats, executor = self.stats, self._executor
        for _ in range(self._plan.steps_from(cursor)):
            started, cpu_before = time.perf_counter(), time.thread_time() + executor.helper_cpu_s
            batch = self._batch(epoch, cursor)
            stats.fill_s += time.perf_counter() - started
            stats.fill_cpu_s += time.thread_time() + executor.helper_cpu_s - cpu_before
            stats.bytes_read, stats.bad_records = executor.bytes_read, len(self._bad_records)
            yield batch
            cursor += self._plan.batch_size

    def _batch(self, epoch: int, cursor: int) -> Batch:
        """The batch at `cursor`; made again without each bad record that it meets."""
        while True:
            try:
                return self._try_batch(epoch, cursor)
            except BadRecordError as error:
                self._bad_records.met(error)

    def _try_batch(self, epoch: int, cursor: int) -> Batch:
        ids, valid = self._plan.ids_at(epoch, cursor=cursor)
        draw, caption_ids = self._recipe.draw(ids, epoch=epoch)
        images, skipped = self._fill(draw)
        columns: dict[str, NDArray[Any]] = {"caption_ids": caption_ids, "sample_ids": ids}
        if self._recipe.augment.mix != "none":
            columns |= self._mix(images, ids, skipped, epoch=epoch, cursor=cursor)
        columns["valid"] = valid & ~skipped
        if skipped.any():
            images[torch.from_numpy(skipped).to(images.device)] = 0.0
        tensors = {name: self._to_device(column) for name, column in columns.items()}
        return Batch(images=images, epoch=epoch, step=cursor // self._plan.batch_size, **tensors)

    def _fill(self, draw: Draw) -> tuple[Tensor, NDArray[np.bool_]]:
        """The pictures, and which of them are to be left out."""
        sources, skipped = self._bad_records.replaced(draw.sources)
        if sources is not draw.sources:
            draw = dataclasses.replace(draw, sources=sources)
        return self._fill_drawn(draw) if self._fill_drawn else self._executor.fill(sources, draw.table()), skipped

    def _mix(self, images: Tensor, ids: Ints, skipped: NDArray[np.bool_], *, epoch: int, cursor: int) -> dict[str, NDArray[Any]]:
        """Blend the samples' partners into `images`; their captions and the weights. Only rows that are mixed are filled.

        Rows whose partner is to be left out are added to `skipped`.
        """
        recipe = self._recipe
        mixture = recipe.mixture(ids, epoch=epoch)
        partners, caption_ids = recipe.draw(self._plan.partners_at(epoch, cursor=cursor), epoch=epoch, partner=True)
        mixed = np.flatnonzero(mixture.weight < 1.0)
        if len(mixed):
            others, partner_skipped = self._fill(partners.rows(mixed))
            skipped[mixed] |= partner_skipped
            chosen = torch.from_numpy(mixed).to(images.device)
            part = images if len(mixed) == len(images) else images[chosen]
            part = blend(part, others, mixture.rows(mixed), mix=recipe.augment.mix, tiles=partners.sources.shape[1])
            if part is not images:
                images[chosen] = part
        return {"partner_caption_ids": caption_ids, "mix_weight": mixture.weight}

    def _to_device(self, column: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(column)
        if self._device.type == "cuda":  # pinned, or each copy would wait for the training step
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor


def make_loader(
    folder: Path,
    *,
    split: str,
    batch_size: int,
    augment: AugmentConfig | None,
    seed: int,
    device: torch.device,
    events: EventLog,
    backend: str = "auto",
    world_size: int = 1,
    rank: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    on_bad_record: Policy = "raise",
) -> Loader:
    """A loader over one split of a data folder.

    Args:
        folder: The data folder.
        split: "train", "val" or "test".
        batch_size: Samples per step over all ranks.
        augment: Ranges of the augmentation; None for none.
        seed: Key of order and augmentation.
        device: Where the batches are wanted.
        events: Told of fallbacks and of bad records.
        backend: "auto", "native", "dali" or "reference".
        world_size: Ranks that share a step.
        rank: Which of them this is.
        shuffle: Permute each epoch.
        drop_last: Leave out the tail of an epoch; otherwise the last batch is padded with `valid` = False.
        on_bad_record: What to do with a record that has changed or cannot be decoded; see `bad_records`.

    Raises:
        ConfigError: unknown backend, a batch size that does not fit the ranks or the split, or an augmentation that does not
            fit the captions.
        DataError: the folder is damaged.
        EnvironmentLackingError: the chosen backend is not available.
    """
    name = choose_backend(backend, device=device, events=events)
    reader = ShardReader(folder, split, events=events)
    try:
        plan = Plan(
            num_samples=len(reader),
            batch_size=batch_size,
            seed=seed,
            world_size=world_size,
            rank=rank,
            shuffle=shuffle,
            drop_last=drop_last,
        )
        executor = _make_executor(name, reader, plan=plan, augment=augment, device=device, events=events)
        bad_records = BadRecords(reader, policy=on_bad_record, events=events)
        return PlannedLoader(executor, reader=reader, plan=plan, augment=augment, device=device, bad_records=bad_records)
    except BaseException:
        reader.close()
        raise


def choose_backend(backend: str, *, device: torch.device, events: EventLog) -> str:
    """The backend that `backend` means on this machine.

    `auto` takes DALI on a GPU and the native backend on a CPU, where it needs a small part of the CPU time of any other. Without
    the C++ extension the native backend is its Python twin.

    Raises:
        ConfigError: unknown name.
        EnvironmentLackingError: it was asked for by name and is not available.
    """
    if backend not in BACKENDS:
        raise ConfigError("unknown loader", where="--loader", expected=", ".join(BACKENDS), got=backend)
    if backend == "reference":
        return "reference"
    if backend == "native" or (backend == "auto" and device.type == "cpu"):
        if native().module is None:
            events.fallback("native loader", chosen="its Python twin", reason=native().reason)
        return "native"
    if dali_installed():
        return "dali"
    if backend == "dali":
        raise EnvironmentLackingError(
            "DALI is not installed", where="--loader dali", fix="pip install nvidia-dali-cuda130, or use --loader auto"
        )
    events.fallback("loader", chosen="reference", reason="DALI is not installed")
    return "reference"


def dali_installed() -> bool:
    """Whether `nvidia.dali` could be imported; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _make_executor(
    name: str, reader: ShardReader, *, plan: Plan, augment: AugmentConfig | None, device: torch.device, events: EventLog
) -> Executor:
    num_threads = usable_threads(world_size=plan.world_size, most=MAX_THREADS)
    if name == "native":
        return _make_native(reader, augment=augment, device=device, num_threads=num_threads, events=events)
    if name == "reference" and device.type == "cuda":
        from pairclip_fast.data.backends.resident import resident_executor

        return resident_executor(reader, augment=augment, device=device, events=events)
    if name == "reference":
        from pairclip_fast.data.backends.reference import ReferenceExecutor

        return ReferenceExecutor(reader, augment=augment, device=device, events=events)
    from pairclip_fast.data.backends.dali import DaliExecutor

    return DaliExecutor(reader, augment=augment, batch_size=plan.local_batch_size, device=device, num_threads=num_threads)


def _make_native(
    reader: ShardReader, *, augment: AugmentConfig | None, device: torch.device, num_threads: int, events: EventLog
) -> Executor:
    module, encoding = native().module, reader.manifest.encoding
    if module is None:
        from pairclip_fast.data.backends.mapped import MappedExecutor

        return MappedExecutor(reader, augment=augment, device=device, num_threads=num_threads)
    from pairclip_fast.data.backends.native import NativeExecutor

    if encoding != "raw" and module.decoder_library(encoding) is None:
        events.fallback(f"decoding of {encoding}", chosen="Pillow", reason="the C++ extension was built where its library was not")
    return NativeExecutor(reader, augment=augment, device=device, num_threads=num_threads)
