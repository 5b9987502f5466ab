"""Properties of the tree itself that no linter checks."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted(path for folder in ("pairclip_fast", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "pairclip_fast").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_code_is_ascii_and_says_what_it_is() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_bytes() for path in CODE if path.stat().st_size}
    assert [name for name, text in texts.items() if not text.isascii()] == []
    assert [name for name, text in texts.items() if not text.startswith(b'"""')] == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in CODE if path.name.startswith("test_")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["demo", "test", "lint"])
def test_make_has_the_target(name: str) -> None:
    assert f"\n{name}: $(VENV)/.installed" in (ROOT / "Makefile").read_text()


def test_readme_begins_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "make demo" in "\n".join(lines[:6])
    assert "make test" in "\n".join(lines[:6])
