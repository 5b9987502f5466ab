"""Opening a loader: which backend this machine and its settings call for, and everything that it needs.

What a loader is, is said in `batch`; how it works, in `planned_loader`. A backend that is not there is replaced by one that
makes the same batches, with one event that says so and why.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.executor import Executor
from pairclip_fast.data.backends.pictures import usable_threads
from pairclip_fast.data.bad_records import BadRecords, Policy
from pairclip_fast.data.batch import Batch, Loader
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.planned_loader import PREFETCH_BATCHES, PlannedLoader
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import ConfigError, EnvironmentLackingError, one_line
from pairclip_fast.events import EventLog
from pairclip_fast.native import native

__all__ = ["BACKENDS", "PREFETCH_BATCHES", "Batch", "Loader", "PlannedLoader", "choose_backend", "dali_installed", "make_loader"]
BACKENDS = ("auto", "native", "dali", "reference")
MAX_THREADS = 8


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
    if device.type == "cuda" and device.index is None:  # what is current here need not be in the loader's thread
        device = torch.device("cuda", torch.cuda.current_device())
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
        executor = _make_executor(name, reader, plan=plan, must=backend == name, augment=augment, device=device, events=events)
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
    name: str, reader: ShardReader, *, plan: Plan, must: bool, augment: AugmentConfig | None, device: torch.device, events: EventLog
) -> Executor:
    """`must`: it was asked for by name, so that what is wrong with it is an error."""
    num_threads = usable_threads(world_size=plan.world_size, most=MAX_THREADS)
    if name == "native":
        return _make_native(reader, augment=augment, device=device, num_threads=num_threads, events=events)
    if name == "reference" and device.type == "cuda":
        from pairclip_fast.data.backends.resident import resident_executor

        return resident_executor(reader, augment=augment, device=device, events=events)
    if name == "reference":
        from pairclip_fast.data.backends.reference import ReferenceExecutor

        return ReferenceExecutor(reader, augment=augment, device=device, events=events)
    if must:
        from pairclip_fast.data.backends.dali import DaliExecutor

        return DaliExecutor(reader, augment=augment, batch_size=plan.local_batch_size, device=device, num_threads=num_threads)
    return dali_or_resident(
        reader, augment=augment, batch_size=plan.local_batch_size, device=device, num_threads=num_threads, events=events
    )


def dali_or_resident(
    reader: ShardReader, *, augment: AugmentConfig | None, batch_size: int, device: torch.device, num_threads: int, events: EventLog
) -> Executor:
    """DALI if it runs on this GPU and makes the pictures that torch makes, else the split in GPU memory."""
    from pairclip_fast.data.backends.resident import resident_executor

    try:
        from pairclip_fast.data.backends.dali import DaliExecutor

        executor = DaliExecutor(reader, augment=augment, batch_size=batch_size, device=device, num_threads=num_threads)
        reason = executor.why_not(augment=augment)
        if reason is None:
            return executor
        executor.close()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a library that does not load, a driver, a GPU that it was not compiled for
        reason = one_line(error)
    events.fallback("DALI loader", chosen="the split in GPU memory", reason=reason)
    return resident_executor(reader, augment=augment, device=device, events=events)


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
