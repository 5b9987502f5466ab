"""Errors say what, where, expected, got and what to do, and cannot be used to write to the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast import errors
from pairclip_fast.errors import PairclipError, printable

EXIT_CODES = {
    "PairclipError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "EnvironmentLackingError": 5,
    "RunBusyError": 6,
    "NumericsError": 7,
    "StorageError": 8,
}


def test_exit_codes_are_the_contract() -> None:
    classes = {c.__name__: c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PairclipError)}
    assert classes == EXIT_CODES


def test_message_has_every_part_and_leaves_out_the_missing() -> None:
    error = errors.DataError("the shard is too short", where="000001.tar", expected=10, got=0, fix="run verify")
    assert str(error).splitlines() == [
        "the shard is too short",
        "  where: 000001.tar",
        "  expected: 10",
        "  got: 0",
        "  what to do: run verify",
    ]
    assert str(errors.DataError("just this")) == "just this"


@given(st.text())
def test_printable_lets_no_control_character_through(text: str) -> None:
    assert all(c == "\n" or c.isprintable() for c in printable(text))


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x9b31m", "\u202egnp.exe", "\x00"])
def test_escapes_are_shown_not_executed(hostile: str) -> None:
    shown = str(PairclipError("odd name", where=f"a{hostile}b"))
    assert hostile not in shown
    assert "\\" in shown


def test_long_values_are_shortened_and_say_so() -> None:
    shown = printable("x" * 10_000, limit=100)
    assert len(shown) < 150
    assert "10000 characters" in shown
