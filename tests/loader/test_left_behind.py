"""What a loader leaves behind when it is broken off, forgotten, forked or closed: nothing; and what it gave stays as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_backend import CPU, FAST, FULL, Open, make_named_loader

from pairclip_fast.data.loader import Loader
from pairclip_fast.events import EventLog

DROPPED_SECONDS = 10.0
"""Nobody waits for the thread of a loader that was dropped without `close`; it ends with the batch that it is making."""


def resources() -> dict[str, int]:
    """Our threads, open files, and mappings of shared memory or of shards."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return {
        "threads": sum(thread.name.startswith("pairclip") for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names only
        "shared memory": maps.count("/dev/shm"),
        "shards": maps.count(".tar"),
    }


def resources_once(settled: Callable[[dict[str, int]], bool], *, seconds: float) -> dict[str, int]:
    """What is held as soon as `settled` says that it is enough, or when the time is up."""
    deadline = time.monotonic() + seconds
    while not settled(held := resources()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names only


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_nothing_is_left_behind(encoding: str, backend: str, folders: dict[str, Path], events: EventLog) -> None:
    """Break off early, forget the iterator, close in the middle, leave it to the garbage collector: nothing stays."""

    def once(way: str) -> None:
        settings = {"split": "train", "batch_size": 8, "augment": FAST, "seed": 0, "device": CPU}
        loader = make_named_loader(folders[encoding], backend=backend, events=events, **settings)
        iterator = iter(loader)
        next(iterator)
        if way == "break":
            for _ in iterator:
                break
        if way == "exception":
            with pytest.raises(KeyError):
                fail(loader)
        if way == "two iterators":
            next(iter(loader))
        if way != "drop":
            loader.close()
            assert next(iterator, None) is None

    for way in ("break", "drop"):
        once(way)  # what the libraries keep for good is there now
    before, native = resources_once(lambda held: held["threads"] == 0, seconds=DROPPED_SECONDS), native_threads()
    assert (before["threads"], before["shards"]) == (0, 0)
    for way in ("break", "exception", "two iterators", "drop", "close"):
        once(way)
        left = resources_once(lambda held: held == before, seconds=DROPPED_SECONDS if way == "drop" else 0.0)
        assert left == before, way
    assert native_threads() <= native + 1


LEAVE_IN_THE_MIDDLE = """
import sys, torch
from pathlib import Path
from typing import Any
from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.loader import make_loader
from pairclip_fast.events import EventLog
loader = make_loader(Path(sys.argv[1]), split="train", batch_size=16, augment=AugmentConfig(rotate_degrees=5.0, saturation=0.5), seed=0,
                     device=torch.device("cpu"), events=EventLog(console=False), backend="reference")
for batch in loader:
    sys.exit(7)
"""


def test_a_process_may_end_in_the_middle(folders: dict[str, Path]) -> None:
    """The thread may be inside torch at that moment, which used to abort the process."""
    done = subprocess.run([sys.executable, "-c", LEAVE_IN_THE_MIDDLE, folders["raw"]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


def fail(loader: Loader) -> None:
    for _ in loader:
        raise KeyError


def test_closing_twice_and_while_iterating_is_fine(backend: str, open_loader: Open) -> None:
    loader = open_loader(backend)
    for number, _ in enumerate(loader):
        if number == 1:
            loader.close()
    assert number == 1
    loader.close()


def test_a_new_iterator_takes_over(backend: str, open_loader: Open) -> None:
    loader = open_loader(backend, augment=None)
    first = iter(loader)
    delivered = [next(first)]
    second = iter(loader)
    delivered += list(second)
    assert next(first, None) is None
    assert [batch.step for batch in delivered] == list(range(7))
    assert loader.state_dict()["epoch"] == 1


def test_pictures_stay_what_they_were(backend: str, open_loader: Open) -> None:
    """No buffer is reused under the consumer's hands, even after the loader is gone."""
    loader = open_loader(backend)
    kept = list(loader)
    copies = [batch.images.clone() for batch in kept]
    for _ in loader:
        pass
    loader.close()
    del loader
    gc.collect()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


def test_a_forked_process_goes_on_with_an_iterator_of_its_own(folders: dict[str, Path], events: EventLog) -> None:
    """As a DataLoader worker or a launcher would: the parent's threads are not there, new ones are started."""
    settings = {"split": "train", "batch_size": 16, "augment": FULL, "seed": 5, "device": CPU}
    loader = make_named_loader(folders["raw"], backend="native", events=events, **settings)
    expected = [batch.images for batch in loader]
    child = os.fork()
    if child == 0:
        loader.set_epoch(0)
        same = all(torch.equal(batch.images, images) for batch, images in zip(loader, expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    loader.close()
