"""Every figure in the tables of `benchmarks/README.md` is its record's, and every record is shown or named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import results

TEXT = results.RESULTS.read_text()
NAMED = TEXT + (results.HERE.parent / "README.md").read_text()


def test_tables_are_those_of_the_records() -> None:
    assert results.with_tables(TEXT) == TEXT, "run: python benchmarks/results.py"


@pytest.mark.parametrize("name", results.TABLES)
def test_every_table_is_shown_and_a_wrong_figure_in_it_is_caught(name: str) -> None:
    table = results.TABLES[name]()
    assert TEXT.count(f"<!-- table: {name} -->\n{table}\n<!-- end -->") == 1
    figure = re.findall(r"\d+\.\d+", table)[-1]
    wrong = TEXT.replace(table, table[: table.rindex(figure)] + "99.9" + table[table.rindex(figure) + len(figure) :])
    assert wrong != TEXT
    assert results.with_tables(wrong) == TEXT


@pytest.mark.parametrize("path", sorted((results.HERE / "records").iterdir()), ids=lambda path: path.name)
def test_every_record_is_named(path: Path) -> None:
    assert re.search(rf"\b{re.escape(path.stem)}(`|{re.escape(path.suffix)}\b)", NAMED)


def test_seeds_of_one_line_differ_in_nothing_else() -> None:
    for name in results.ACCURACY:
        rows = results.record(name)
        assert len({row["seed"] for row in rows}) == len(rows)
        for row in rows:
            row["config"]["train"]["seed"] = None
            assert row["config"] == rows[0]["config"], name
