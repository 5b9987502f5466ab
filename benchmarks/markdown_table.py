"""Tables in Markdown, as the benchmarks write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A head line, a rule and the rows; bars within a cell are escaped."""
    lines = (columns, ("---",) * len(columns), *rows)
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
