"""The loader: batches in the plan's order from whichever backend, ahead of time, with a state of a few integers.

What every backend must guarantee (same stream, placement independence, exactly once, exact resume) is guaranteed here,
once: a backend only turns ids and parameters into pictures (`backends.executor`). The position is a number of samples of
the global order, so a run may go on with another batch size or world size and still see the same sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.backends.executor import DrawingExecutor, Executor
from pairclip_fast.data.bad_records import BadRecords
from pairclip_fast.data.batch import Batch
from pairclip_fast.data.mixing import blend
from pairclip_fast.data.parameters import Draw
from pairclip_fast.data.plan import Plan
from pairclip_fast.data.prefetch import Prefetcher
from pairclip_fast.data.recipe import Recipe
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.data.stats import LoaderStats
from pairclip_fast.data.upload import Uploads
from pairclip_fast.errors import DataError

Ints = NDArray[np.int64]
STATE_VERSION = 1
PREFETCH_BATCHES = 2


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
        self._uploads, self._bad_records = Uploads(device), bad_records
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
        if self._device.type == "cuda":  # each thread has its own current device, at first the first
            torch.cuda.set_device(self._device)
        stats, executor = self.stats, self._executor
        cpu_before = time.thread_time() + executor.helper_cpu_s
        for _ in range(self._plan.steps_from(cursor)):
            started = time.perf_counter()
            batch = self._batch(epoch, cursor)
            stats.fill_s += time.perf_counter() - started
            cpu_now = time.thread_time() + executor.helper_cpu_s  # once per batch: the system is asked each time
            stats.fill_cpu_s, cpu_before = stats.fill_cpu_s + cpu_now - cpu_before, cpu_now
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
        tensors = {name: self._uploads(torch.from_numpy(column)) for name, column in columns.items()}
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
            told = mixture.rows(mixed)
            chosen, weight, box = (self._uploads(torch.from_numpy(values)) for values in (mixed, told.weight, told.box))
            part = images if len(mixed) == len(images) else images[chosen]
            part = blend(part, others, weight, box, mix=recipe.augment.mix, tiles=partners.sources.shape[1])
            if part is not images:
                images[chosen] = part
        return {"partner_caption_ids": caption_ids, "mix_weight": mixture.weight}
