"""Damaged checkpoints, numbers that are not finite, no memory, no disk: a clear error, and nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from tiny_runs import STEPS, Options, at_step, hurry, losses, terminate, weights

from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import CheckpointError, EnvironmentLackingError, NumericsError, StorageError
from pairclip_fast.events import EventLog, read_events
from pairclip_fast.report.commands import run_report
from pairclip_fast.storage import FileSystem
from pairclip_fast.train import checkpoint, device, loop, planning, runner
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.runner import Runner
from pairclip_fast.train.signals import TerminatedRunError

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_a_checkpoint_of_another_model_is_refused_with_the_names(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    found = checkpoint.load(path)
    model = {name: value for name, value in found.model.items() if "head.bias" not in name} | {"module.extra": torch.ones(2)}
    store = checkpoint.CheckpointStore(path.parent, events=EventLog(None, console=False))
    store.save(dataclasses.replace(found, model=model), step=3, best=None)
    with pytest.raises(CheckpointError) as caught:
        run_train(options(resume=True))
    assert caught.value.exit_code == 4
    assert "module.encoder.head.bias" in str(caught.value)
    assert "module.extra" in str(caught.value)


def test_an_optimizer_state_with_holes_is_refused(options: Options, tmp_path: Path) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(), events=at_step(2, terminate))
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    found = checkpoint.load(path)
    store = checkpoint.CheckpointStore(path.parent, events=EventLog(None, console=False))
    optimizer = {name: value for name, value in found.optimizer.items() if name != "encoder.head.weight/exp_avg"}
    store.save(dataclasses.replace(found, optimizer=optimizer), step=3, best=None)
    with pytest.raises(CheckpointError, match=r"encoder\.head\.weight/exp_avg"):
        run_train(options(resume=True))


def test_damage_costs_one_checkpoint_and_is_said(options: Options, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(TerminatedRunError):
        run_train(options(out="parts"), events=at_step(6, terminate))
    file = tmp_path / "parts" / "checkpoints" / "step-00000006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run_train(options(out="parts", resume=True))
    assert weights(whole[0]) == weights(tmp_path / "parts")
    started = [event for event in read_events(tmp_path / "parts" / "events.jsonl") if event["event"] == "run_started"]
    assert [event["resumed_step"] for event in started] == [0, 4]
    fallbacks = [event for event in read_events(tmp_path / "parts" / "events.jsonl") if event["event"] == "fallback"]
    assert any("step-00000006" in event["reason"] for event in fallbacks)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_before_the_update(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, whole: tuple[Path, dict[str, Any]]
) -> None:
    forward, step = loop.LossModule.forward, loop.train_step

    def poisoned(self: loop.LossModule, *arguments: Any) -> torch.Tensor:
        value = forward(self, *arguments)
        return value * float("nan") if bad == "loss" else value + (self.loss.logit_scale - self.loss.logit_scale.detach()).abs().sqrt()

    def poisoned_step(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(loop.LossModule, "forward", poisoned if named["step"] == 5 else forward)
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", poisoned_step)
    with pytest.raises(NumericsError, match="step 5") as caught:
        run_train(options())
    assert caught.value.exit_code == 7
    assert "a new run with a lower --lr" in str(caught.value), "--resume would refuse it"
    events = read_events(tmp_path / "run" / "events.jsonl")
    (event,) = [event for event in events if event["event"] == "numerics"]
    assert len(event["sample_ids"]) == len(event["caption_ids"]) == 16
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4]
    assert (events[-1]["event"], events[-1]["reason"], events[-1]["error"]) == ("finished", "failed", str(caught.value))
    assert run_report(tmp_path / "run", events=EventLog(None, console=False))["state"] == "failed"
    monkeypatch.undo()
    hurry(monkeypatch)
    run_train(options(resume=True))
    assert weights(tmp_path / "run") == weights(whole[0])


def test_out_of_memory_saves_and_says_what_may_fit(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]
) -> None:
    step = loop.train_step

    def exploding(*arguments: Any, **named: Any) -> Any:
        if named["step"] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", exploding)
    with pytest.raises(EnvironmentLackingError, match="--batch-size 8") as caught:
        run_train(options())
    assert caught.value.exit_code == 5
    monkeypatch.setattr(loop, "train_step", step)
    run_train(options(resume=True))
    assert losses(tmp_path / "run") == losses(whole[0])
    assert weights(tmp_path / "run") == weights(whole[0])


def test_out_of_memory_in_the_middle_of_an_update_saves_nothing(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]
) -> None:
    """Some weights have moved and some have not."""
    update, steps = torch.optim.AdamW.step, itertools.count()

    def exploding(self: torch.optim.AdamW, *arguments: Any) -> Any:
        if next(steps) == 6:
            self.param_groups[0]["params"][0].data += 1.0
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    with pytest.raises(EnvironmentLackingError, match="step 6"):
        run_train(options())
    checkpoints = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "checkpoint"]
    assert checkpoints == [4]
    monkeypatch.undo()
    hurry(monkeypatch)
    run_train(options(resume=True))
    assert weights(tmp_path / "run") == weights(whole[0])


def test_out_of_memory_before_the_first_step_says_the_same(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_arguments: Any, **_named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planning, "probe", exhausted)
    with pytest.raises(EnvironmentLackingError, match=r"(?s)before the first step.*--batch-size 8"):
        run_train(options())
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["reason"] == "failed"


def test_a_bug_of_ours_is_an_end_too(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_arguments, **_named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train(options())
    last = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert (last["reason"], last["error"]) == ("failed", "ZeroDivisionError: division by zero")


@pytest.fixture
def bad_after_five(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Step 5 has a loss that is not finite, and a process believes that it is one of so many. The list gets the steps it has made.

    All processes look at the numbers at the ends of epochs, which are every fourth step.
    """
    step, after_step, made = loop.train_step, Runner._after_step, list[int]()

    def poisoned_step(trainee: Any, batch: Any, **named: Any) -> Any:
        if named["step"] == 5:
            batch = dataclasses.replace(batch, images=batch.images * float("nan"))
        return step(trainee, batch, **named)

    def install(world_size: int) -> list[int]:
        def watched(self: Runner, *arguments: Any) -> bool:
            made.append(self.progress.step)
            self.parts = dataclasses.replace(self.parts, processes=Processes(world_size=world_size))
            if self.progress.step == 7:
                self.save()
            return after_step(self, *arguments)

        monkeypatch.setattr(loop, "train_step", poisoned_step)
        monkeypatch.setattr(device.Placement, "guard_steps", 1_000)
        monkeypatch.setattr(Processes, "agree", lambda _self, value: value)
        monkeypatch.setattr(Runner, "_after_step", watched)
        return made

    return install


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_of_several_processes_does_not_leave_alone(
    options: Options, tmp_path: Path, bad_after_five: Callable[[int], list[int]], world_size: int
) -> None:
    """Whose clock says that it is time to tell or to save looks at the numbers alone; the others would wait for it for ever."""
    made = bad_after_five(world_size)
    with pytest.raises(NumericsError, match="step 5"):
        run_train(options())
    assert made[-1] == (6 if world_size == 1 else 8)
    checkpoints = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "checkpoint"]
    assert checkpoints == [4], "nothing is saved after the bad step"


def test_a_signal_does_not_hide_a_bad_loss(
    options: Options, tmp_path: Path, bad_after_five: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes that stop together before they have looked: nothing is saved, so nobody may say so."""
    bad_after_five(2)
    monkeypatch.setattr(runner, "AGREEMENT_STEPS", 1)
    with pytest.raises(NumericsError, match="step 5"):
        run_train(options(), events=at_step(7, terminate))
    reasons = [event["reason"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "finished"]
    assert reasons == ["failed"]


def fail_writes(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path], bool]) -> None:
    write = FileSystem.write

    def full(self: FileSystem, file: IO[bytes], data: bytes | memoryview) -> None:
        if when(Path(file.name)):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, data)

    monkeypatch.setattr(FileSystem, "write", full)


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_a_note(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def while_second_epoch(path: Path) -> bool:
        return path.name == "optimizer.safetensors" and len(losses(tmp_path / "run")) == 8

    fail_writes(monkeypatch, while_second_epoch)
    assert run_train(options())["reason"] == "epochs"
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4, 12]
    assert any("could not be saved" in event["message"] for event in events if event["event"] == "note")


def test_a_last_save_that_fails_is_exit_8(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, dict[str, Any]]
) -> None:
    fail_writes(monkeypatch, lambda path: path.name == "optimizer.safetensors" and len(losses(tmp_path / "run")) >= 8)
    with pytest.raises(StorageError, match="bytes free") as caught:
        run_train(options())
    assert caught.value.exit_code == 8
    monkeypatch.undo()
    hurry(monkeypatch)
    assert run_train(options(resume=True))["steps"] == STEPS
    assert weights(tmp_path / "run") == weights(whole[0])


def test_a_bad_held_out_record_is_told_before_the_training_or_left_out(options: Options, data: Path, tmp_path: Path) -> None:
    with ShardReader(data, "val") as reader:
        path, offset = reader.shard_paths[0], int(reader.records.offsets[1])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRecordError, match="have changed"):
        run_train(options())
    assert losses(tmp_path / "run") == {}
    run_train(options(out="other", on_bad_record="skip", epochs=1))
    metrics = json.loads((tmp_path / "other" / "evaluations" / "val.json").read_text())
    assert metrics["num_pairs"] == 23  # of 24
