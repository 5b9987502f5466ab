"""SIGINT and SIGTERM finish the step, save and leave; SIGUSR1 saves and goes on; a second SIGINT stops at once.

The handlers only set a flag: a save that is under way completes, a step that is under way is kept.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from pairclip_fast.errors import PairclipError


class InterruptedRunError(PairclipError):
    """Stopped by SIGINT, after saving."""

    exit_code: ClassVar[int] = 130


class TerminatedRunError(PairclipError):
    """Stopped by SIGTERM, after saving."""

    exit_code: ClassVar[int] = 143


STOPPING: dict[int, type[PairclipError]] = {signal.SIGINT: InterruptedRunError, signal.SIGTERM: TerminatedRunError}
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalFlags:
    """Context manager that notes signals instead of dying from them. Does nothing outside of the main thread."""

    def __init__(self) -> None:
        self.stop = 0
        """Number of the signal that asks to stop, 0 for none."""
        self._save = False
        self._before: dict[int, Any] = {}

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def __enter__(self) -> SignalFlags:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        self.stop = self.stop or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel ends the process at a second one, whatever it is doing
