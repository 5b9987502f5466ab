"""Names from outside are text on the page, whatever they contain (fault X2)."""

from __future__ import annotations

import html as html_module
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pairclip_fast.events import EventLog
from pairclip_fast.report.commands import render_report, run_report
from pairclip_fast.report.gallery import caption_text
from pairclip_fast.report.words import shown

MakeRun = Callable[..., Path]
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    '\'" onerror=alert(3) x="',
    "</svg></title><img src=x onerror=alert(4)>",
    "\x1b[31mred\x1b[0m\x07",
    "two\nlines\r\ttab",
    "\u202egnirts desrever\u2066",
    "$\\frac{1}{0$",
    "{{ 7 * 7 }}{% raw %}{left}",
    "%s%n%d",
    "\x00\x08nul",
    "x" * 10_000,
    "&lt;b&gt;already&amp;",
    "javascript:alert(5)",
)


class Tags(HTMLParser):
    """Names of elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attribute_names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attribute_names.update(name for name, _ in attrs)


@pytest.fixture(scope="module")
def hostile_page(fake_run_in: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    names = tuple(f"{text}{index}" for index in range(2) for text in HOSTILE)
    run = fake_run_in(
        tmp_path_factory.mktemp("hostile"),
        class_names=names,
        run_name="<i>run & 'co'",
        note="<script>note</script>\x1b[2J\nnext",
        epochs=2,
        resumed=False,
    )
    with (run / "events.jsonl").open("a") as log:
        for text in (*HOSTILE, "\ud800 lone surrogate"):
            log.write(json.dumps({"event": "fallback", "what": text, "chosen": text, "reason": text, "attempt": text}) + "\n")
            log.write(json.dumps({"event": "eval", "step": 7, "split": text, "metrics": {"top1": 0.5, text: text}}) + "\n")
            log.write(json.dumps({"event": "signal", "name": text, "step": 3}) + "\n")
    (run / "environment.json").write_text(json.dumps({text: {text: [text, {text: text}]} for text in HOSTILE}))
    summary = run_report(run, events=EventLog(console=False))
    return (run / "report.html").read_text(encoding="ascii"), render_report(summary)


def test_no_element_or_attribute_comes_from_a_name(hostile_page: tuple[str, str], fake_run: MakeRun, tmp_path: Path) -> None:
    page, _ = hostile_page
    (tmp_path / "harmless").mkdir()
    harmless = fake_run(run_name="harmless/run", epochs=2, resumed=False)
    run_report(harmless, events=EventLog(console=False))
    expected = Tags((harmless / "report.html").read_text())
    found = Tags(page)
    assert found.names <= expected.names | {"ul", "li", "strong"}
    assert found.attribute_names <= expected.attribute_names | {"role"}
    assert "script" not in found.names
    assert "onerror" not in found.attribute_names


def test_no_control_character_reaches_page_or_terminal(hostile_page: tuple[str, str]) -> None:
    page, said = hostile_page
    text = html_module.unescape(page)
    for character in ("\x00", "\x07", "\x08", "\x1b", "\x7f", "\u202e", "\u2066", "\ud800"):
        assert character not in text
        assert character not in said
    assert "\\x1b[31mred" in text, "shown as what it is"


def test_long_names_are_shortened_everywhere(hostile_page: tuple[str, str]) -> None:
    page, _ = hostile_page
    assert "x" * 500 not in page
    assert len(page) < 3_000_000


def test_templates_in_names_are_not_evaluated(hostile_page: tuple[str, str]) -> None:
    page, _ = hostile_page
    assert "{{ 7 * 7 }}" in page
    assert caption_text("{left} {right} {left.__class__} {0}", "{right}", "b") == "{right} b {left.__class__} {0}"


@pytest.mark.parametrize("text", HOSTILE)
def test_shown_is_one_short_printable_line(text: str) -> None:
    result = shown(text)
    assert result.isprintable()
    assert len(result) <= 200
