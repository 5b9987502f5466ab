"""The event log: whole lines only, and after a resume the truth of the last attempt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclip_fast.events import EventLog, last_attempts, read_events


def started(attempt: int, resumed_step: int | None = 0) -> dict[str, Any]:
    fields = {} if resumed_step is None else {"resumed_step": resumed_step}
    return {"event": "run_started", "attempt": attempt, **fields}


def step(number: int, attempt: int, **fields: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "attempt": attempt, **fields}


def steps_of(events: list[dict[str, Any]], kind: str = "step") -> list[tuple[int, int]]:
    return [(event["step"], event["attempt"]) for event in events if event["event"] == kind]


def test_steps_beyond_the_resumed_checkpoint_are_superseded_even_if_not_logged_again() -> None:
    events = [started(1), step(7, 1), step(10, 1), step(13, 1), step(17, 1), started(2, 10), step(15, 2)]
    assert steps_of(last_attempts(events)) == [(7, 1), (10, 1), (15, 2)]


def test_the_evaluation_at_the_checkpoint_is_kept() -> None:
    events = [started(1), {"event": "eval", "step": 10, "split": "val", "attempt": 1}, step(12, 1), started(2, 10), step(20, 2)]
    assert steps_of(last_attempts(events), "eval") == [(10, 1)]


def test_what_is_measured_again_at_the_resumed_step_replaces_the_earlier() -> None:
    events = [started(1), step(10, 1), started(2, 10), step(10, 2)]
    assert steps_of(last_attempts(events)) == [(10, 2)]


def test_a_fresh_start_in_the_same_folder_drops_all_earlier_steps() -> None:
    assert steps_of(last_attempts([started(1), step(0, 1), step(3, 1), started(2, 0), step(2, 2)])) == [(2, 2)]
    assert steps_of(last_attempts([started(1), step(0, 1), step(3, 1), started(2, None), step(2, 2)])) == [(2, 2)]


def test_later_resume_from_an_earlier_step_reaches_back_over_attempts() -> None:
    events = [started(1), step(5, 1), step(15, 1), started(2, 10), step(12, 2), step(30, 2), started(3, 5), step(6, 3)]
    assert steps_of(last_attempts(events)) == [(5, 1), (6, 3)]


def test_signals_and_ends_are_history_and_stay() -> None:
    events = [started(1), {"event": "signal", "step": 9, "attempt": 1}, {"event": "finished", "step": 9, "attempt": 1}, started(2, 4)]
    assert [event["event"] for event in last_attempts(events)] == ["run_started", "signal", "finished", "run_started"]


def test_splits_are_kept_apart() -> None:
    evals = [{"event": "eval", "step": 4, "split": split, "attempt": 1} for split in ("val", "test")]
    assert last_attempts(evals) == evals


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=6))
def test_the_survivors_are_those_of_a_run_that_is_replayed(attempts: list[tuple[int, int]]) -> None:
    """Oracle: replay the attempts, truncating the measured steps to the checkpoint at each resume."""
    events: list[dict[str, Any]] = []
    truth: dict[int, int] = {}
    reached = 0
    for attempt, (length, back) in enumerate(attempts, start=1):
        resumed = max(reached - back, 0)
        truth = {number: owner for number, owner in truth.items() if number <= resumed}
        events.append(started(attempt, resumed))
        for number in range(resumed + 1, resumed + 1 + length):
            events.append(step(number, attempt))
            truth[number] = attempt
        reached = resumed + length
    assert steps_of(last_attempts(events)) == sorted(truth.items())


def test_a_partial_last_line_is_cut_and_junk_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "note", "message": "a"}\n[1]\n{"no": "event"}\n\xff\xfe\n{"event": "st')
    assert [event["message"] for event in read_events(path)] == ["a"]
    log = EventLog(path, console=False, attempt=2)
    log.note("b")
    log.close()
    assert [event["message"] for event in read_events(path)] == ["a", "b"]
    assert path.read_bytes().endswith(b"\n")


def test_one_event_is_one_line_whatever_it_says(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, console=False)
    log.note("two\nlines \x1b[31mred\u2028 \ud800", value=math.nan, nested=[math.inf, {"x": -math.inf}])
    log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["value"] is None
    assert json.loads(lines[0])["nested"] == [None, {"x": None}]


def test_a_fallback_is_said_once_and_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog()
    for _ in range(2):
        log.fallback("loader", chosen="reference", reason="\x1b[31mno dali")
    said = capsys.readouterr().err
    assert said.count("loader: using reference") == 1
    assert "\x1b" not in said
    assert len(log.fallbacks) == 1


def test_no_log_file_at_all(tmp_path: Path) -> None:
    assert read_events(tmp_path / "absent.jsonl") == []
