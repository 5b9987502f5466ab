"""The page: whole for whole runs, honest for partial ones, and the same bytes for the same input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairclip_fast.errors import ConfigError
from pairclip_fast.events import EventLog
from pairclip_fast.report.commands import render_report, run_report
from pairclip_fast.report.data import read_run

MakeRun = Callable[..., Path]
Whole = tuple["Page", str, dict[str, Any]]
SIZE_LIMIT_BYTES = 5_000_000
SECTIONS = ["Results", "Curves", "Time and memory", "Classes", "Gallery", "Attention", "History", "Setup"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            tag, before = self.headings[-1]
            self.headings[-1] = (tag, before + data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def write_report(run: Path) -> tuple[Page, str, dict[str, Any]]:
    summary = run_report(run, events=EventLog(console=False))
    html = (run / "report.html").read_text(encoding="ascii")
    return Page(html), html, summary


def assert_self_contained(page: Page, html: str) -> None:
    for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
        for value in page.attributes(name):
            assert value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")), (name, value[:80])
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(names)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")
    assert "://" not in html.replace("&#", "")
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"},
    ) in page.tags


@pytest.fixture(scope="module")
def whole(fake_run_in: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The page of a finished, once resumed run."""
    return write_report(fake_run_in(tmp_path_factory.mktemp("whole")))


def test_a_whole_run_has_every_section_and_needs_nothing_else(whole: Whole) -> None:
    page, html, summary = whole
    assert_self_contained(page, html)
    assert [text for tag, text in page.headings if tag == "h2"] == SECTIONS
    assert len([tag for tag, _ in page.headings if tag == "h1"]) == 1
    assert len(html) < SIZE_LIMIT_BYTES
    figures = [text.split("  ")[0] for tag, text in page.headings if tag == "h3"]
    for title in (
        "Held-out accuracy",
        "Training loss",
        "Learning rate",
        "Logit scale",
        "Pairs per second",
        "Waiting for data (%)",
        "Memory (GiB)",
        "Where the time went (%)",
    ):
        assert title in figures
    assert summary["state"] == "finished"
    assert summary["split"] == "test"
    assert summary["problems"] == []
    assert 0 < summary["metrics"]["top1"] < 1
    assert render_report(summary).endswith("report.html")


def test_identifiers_are_unique_and_references_resolve(whole: Whole) -> None:
    page, html, _ = whole
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    targets = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    targets += [piece.split(")")[0] for piece in html.split("url(#")[1:]]
    assert set(targets) <= set(identifiers)


def test_every_picture_and_figure_says_what_it_shows(whole: Whole) -> None:
    page, _, _ = whole
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 12 + 2 * 6
    assert all(attrs.get("alt") for attrs in images)
    assert all((attrs.get("src") or "").startswith("data:image/") for attrs in images)
    labelled = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labelled) >= 8
    assert all(attrs.get("aria-label") for attrs in labelled)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_words_state_the_result_chance_and_the_claims_of_others(whole: Whole) -> None:
    page, _, summary = whole
    assert summary["sentence"] in page.words
    ratio = summary["metrics"]["top1"] * summary["metrics"]["num_captions"]
    assert summary["ratio_to_chance"] == pytest.approx(ratio, abs=1e-3)
    assert f"{ratio:,.0f} times what chance gives" in page.words
    for claim in ("0.24 %", "1.69 %", "10.97 %", "2 - 5 %", "15 - 25 %", "40 - 60 %", "baseline (claimed)", "hoped for"):
        assert claim in page.words
    assert "this run, test" in page.words
    assert "this run, val" in page.words


def test_fallbacks_resume_and_end_are_on_the_timeline(whole: Whole) -> None:
    page, _, summary = whole
    assert "this CPU has no bf16 instructions" in page.words
    assert summary["fallbacks"] == 2, "said by both attempts, shown once"
    assert "Resumed from step 360" in page.words
    assert "No end on record: the process was killed or the machine stopped" in page.words
    assert "Finished: all epochs done at step 1,080" in page.words
    assert "3 values measured beyond the checkpoint it went back to are left out" in page.words


def test_same_input_same_bytes(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run()
    run_report(run, events=EventLog(console=False))
    first = (run / "report.html").read_bytes()
    program = (
        "import sys; from pathlib import Path; from pairclip_fast.events import EventLog;"
        "from pairclip_fast.report.commands import run_report;"
        "run_report(Path(sys.argv[1]), events=EventLog(console=False)); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", "the report room must not import torch"
    assert (run / "report.html").read_bytes() == first
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_a_run_that_is_still_going(fake_run: MakeRun) -> None:
    run = fake_run(finished=False, splits=(), epochs=3, resumed=False)
    with (run / "events.jsonl").open("a") as log:
        log.write('{"event": "step", "step": 99')  # killed within a write
    page, html, summary = write_report(run)
    assert_self_contained(page, html)
    assert summary["state"] == "open"
    assert summary["split"] == "val", "taken from the last evaluation event"
    assert "the run is still going or was killed (last logged step 270)" in page.words


def test_a_run_that_failed(fake_run: MakeRun) -> None:
    run = fake_run(finished=False, splits=(), epochs=3, resumed=False)
    error = "the disk is full\n  where: here"
    with (run / "events.jsonl").open("a") as log:
        log.write(json.dumps({"event": "finished", "attempt": 1, "reason": "failed", "error": error}) + "\n")
    page, html, summary = write_report(run)
    assert_self_contained(page, html)
    assert summary["state"] == "failed"
    assert page.words.count("Failed: the disk is full") == 2, "at the top and in the history"
    assert "still going" not in page.words


def test_a_run_that_has_only_begun(fake_run: MakeRun) -> None:
    run = fake_run(splits=(), epochs=2, resumed=False)
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text(lines[0] + "\n")
    (run / "captions.safetensors").unlink()
    (run / "manifest.json").unlink()
    page, _, summary = write_report(run)
    assert "Nothing has been evaluated yet." in page.words
    assert "No step has been logged yet." in page.words
    assert summary["metrics"] == {}
    assert summary["ratio_to_chance"] is None


def test_a_run_without_pictures(fake_run: MakeRun) -> None:
    page, _, _ = write_report(fake_run(pictures=False, splits=("val",)))
    assert [text for tag, text in page.headings if tag == "h2"] == ["Results", "Curves", "Time and memory", "Classes", "History", "Setup"]
    assert not [tag for tag, _ in page.tags if tag == "img"]


@pytest.mark.parametrize(
    "name", ["config.toml", "environment.json", "manifest.json", "captions.safetensors", "evaluations/test.json", "evaluations/test.npz"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"PK\x03\x04 cut off"], ids=["empty", "brace", "list", "bytes", "zip"]
)
def test_a_damaged_file_is_one_problem(fake_run: MakeRun, name: str, content: bytes) -> None:
    run = fake_run(epochs=2, resumed=False, pictures=False)
    (run / name).write_bytes(content)
    problems = read_run(run).problems
    if not (name == "config.toml" and content == b""):  # an empty TOML file is a valid, empty table
        assert len(problems) == 1
        assert name.split("/")[-1] in problems[0]


def test_all_files_damaged_but_the_log(fake_run: MakeRun) -> None:
    run = fake_run(epochs=2, resumed=False)
    for name in (
        "config.toml",
        "environment.json",
        "manifest.json",
        "captions.safetensors",
        "evaluations/test.json",
        "evaluations/test.npz",
    ):
        (run / name).write_bytes(b"{")
    page, html, summary = write_report(run)
    assert_self_contained(page, html)
    assert len(summary["problems"]) == 5, "the arrays of an evaluation without metrics are not read"
    assert "This page is incomplete." in page.words
    assert "Training loss" in page.words
    assert "tile_vit" in page.words, "the configuration is also in the log"


def test_truncated_arrays_at_any_byte(fake_run: MakeRun) -> None:
    run = fake_run(epochs=1, resumed=False, splits=("val",))
    path = run / "evaluations" / "val.npz"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in sorted(rng.integers(0, len(whole), 12)):
        path.write_bytes(whole[:cut])
        record = read_run(run)
        assert record.problems
        assert record.evaluations["val"].arrays == {}
    for position in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        read_run(run)  # must not raise; a flip in an array's middle is found by the archive's checksum


def test_arrays_of_unexpected_form_are_left_out(fake_run: MakeRun) -> None:
    run = fake_run(epochs=1, resumed=False, splits=("val",))
    path = run / "evaluations" / "val.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    changes: dict[str, Any] = {
        "gallery_index": arrays["gallery_index"] + 10**6,
        "top_ids": arrays["top_ids"].astype(np.float32),
        "gallery_images": arrays["gallery_images"][..., :2],
        "attention": np.zeros((0, 4, 8), np.float32),
        "per_class_left_total": arrays["per_class_left_total"][:3],
        "caption_ids": arrays["caption_ids"][:-1],
        "foreign": np.array(["<script>"]),
    }
    np.savez(path, **{**arrays, **changes})
    page, html, summary = write_report(run)
    assert_self_contained(page, html)
    said = " ".join(summary["problems"])
    for name in changes.keys() - {"foreign"}:
        assert name in said
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_pickled_arrays_are_not_unpickled(fake_run: MakeRun, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (canary.write_text, ("executed",))

    run = fake_run(epochs=1, resumed=False, splits=("val",))
    np.savez(run / "evaluations" / "val.npz", ranks=np.array([Hostile()], dtype=object))
    _, _, summary = write_report(run)
    assert not canary.exists()
    assert any("val.npz" in problem for problem in summary["problems"])


def test_values_of_wrong_types_everywhere(fake_run: MakeRun) -> None:
    run = fake_run(epochs=1, resumed=False, splits=("val",))
    odd: list[Any] = [None, "x", [], {}, True, -1, 1e308, 10**400, float("nan")]
    kinds = ("run_started", "memory", "step", "eval", "checkpoint", "signal", "finished", "fallback", "note", "unknown", "numerics")
    keys = (
        "time",
        "attempt",
        "step",
        "split",
        "metrics",
        "plan",
        "config",
        "resumed_step",
        "loss",
        "memory",
        "pflop",
        "samples_seen",
        "reason",
        "message",
        "time_s",
        "fill_s",
        "telemetry_share",
        "rows",
        "peak_gib",
    )
    with (run / "events.jsonl").open("a") as log:
        for kind in kinds:  # the last beginning comes before all measurements, else it would supersede them
            for value in odd:
                log.write(json.dumps({"event": kind, **dict.fromkeys(keys, value)}) + "\n")
    metrics = dict(zip(("top1", "top10", "num_captions", "num_pairs", "mrr", "precision_at_k"), odd, strict=False))
    (run / "evaluations" / "val.json").write_text(json.dumps(metrics))
    (run / "manifest.json").write_text(json.dumps({"class_names": {"a": 1}, "template": 3, "skipped": [1, {"where": None}], "notes": "x"}))
    (run / "environment.json").write_text(json.dumps({"fallbacks": [1, {"what": []}], "nested": [[{"a": []}]]}))
    page, html, _ = write_report(run)
    assert_self_contained(page, html)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        run_report(tmp_path, events=EventLog(console=False))
    with pytest.raises(ConfigError, match="no such folder"):
        run_report(tmp_path / "absent", events=EventLog(console=False))
    assert list(tmp_path.iterdir()) == []
