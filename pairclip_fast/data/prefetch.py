"""One background thread that keeps a few items ready, and that is gone when its consumer is.

A thread and not a process: the work is numpy, torch and DALI calls that release the interpreter lock, and nothing has to
be copied or pickled. An exception of the source is raised where the items are taken.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Run `source` ahead of its consumer.

    Args:
        source: Produces the items; used by the thread alone.
        depth: Items that may be ready or in the making, 1 or more.
    """

    def __init__(self, source: Iterator[Item], *, depth: int) -> None:
        self._source = source
        self._ready: SimpleQueue[Item | _End] = SimpleQueue()
        self._free: SimpleQueue[None] = SimpleQueue()  # a semaphore in C; the one of `threading` is written in Python
        for _ in range(depth):
            self._free.put(None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pairclip-loader", daemon=True)
        # A thread that is inside C++ code when the interpreter ends takes the whole process down (SIGABRT).
        atexit.register(self.close)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Items that `get` would give at once."""
        return self._ready.qsize()

    def get(self) -> Item | None:
        """The next item, waiting for it; None at the end of the source, and after `close`."""
        if self._stopped.is_set():
            return None
        item = self._ready.get()
        self._free.put(None)
        if isinstance(item, _End):
            self._stopped.set()
            if item.error is not None:
                raise item.error
            return None
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call twice."""
        self._stopped.set()
        self._free.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            while True:
                self._free.get()
                if self._stopped.is_set():
                    break
                item = next(self._source, None)
                if item is None:
                    break
                self._ready.put(item)
        except BaseException as caught:  # noqa: BLE001 - not swallowed: `get` raises it in the consumer
            error = caught
        self._ready.put(_End(error))


class _End:
    """The last thing in the queue."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
