"""The failures a user can meet: one class per exit code, each saying what, where, expected, got and what to do.

A failure that is not one of these is a bug of ours: it keeps its traceback and leaves with exit code 1.
"""

from __future__ import annotations

from typing import ClassVar

REASON_LENGTH = 300
"""Characters of somebody else's error that a reason of ours repeats."""


class PairclipError(Exception):
    """An expected failure; printed without a traceback.

    Args:
        what: The failure in one sentence.
        where: The file, field, shard or step it was found at.
        expected: What would have been right.
        got: What was there instead.
        fix: What the user can do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        rows = (("where", where), ("expected", expected), ("got", got), ("what to do", fix))
        super().__init__("\n".join([what, *(f"  {name}: {printable(value)}" for name, value in rows if value is not None)]))


class ConfigError(PairclipError):
    """Wrong usage: a flag, a config key, or a combination of them."""

    exit_code = 2


class DataError(PairclipError):
    """Source images, shards, a manifest or a caption bank are damaged or do not fit together."""

    exit_code = 3


class CheckpointError(PairclipError):
    """No whole checkpoint, or one of another model, config or format version."""

    exit_code = 4


class EnvironmentLackingError(PairclipError):
    """This machine lacks something the command cannot do without (a package, weights, memory)."""

    exit_code = 5


class RunBusyError(PairclipError):
    """Another process owns the run folder, or is writing the data folder."""

    exit_code = 6


class NumericsError(PairclipError):
    """Loss or gradient stopped being finite."""

    exit_code = 7


class StorageError(PairclipError):
    """No space, or the disk failed."""

    exit_code = 8


def one_line(error: BaseException) -> str:
    """The class and the words of somebody else's error, as a reason within a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON_LENGTH]}"


def printable(value: object, *, limit: int = 2_000) -> str:
    """`value` as text that is safe on a terminal: control characters escaped, over-long text shortened."""
    text = str(value)
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
