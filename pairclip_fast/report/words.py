"""Text from outside, made fit to show."""

from __future__ import annotations

from pairclip_fast.errors import printable

SHORT_TEXT = 160
"""Characters of a name or message that the page shows; a 10 kB class name must not push everything else away."""


def shown(value: object, *, limit: int = SHORT_TEXT) -> str:
    """`value` as one line without control characters, shortened in the middle."""
    text = printable(value, limit=8 * limit).replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} ... {text[-limit // 6 :]}"


def first_line(value: object) -> str:
    """What an error says before it says where and why."""
    return shown(str(value).partition("\n")[0])
