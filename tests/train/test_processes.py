"""Real processes: signals as a shell or a scheduler sends them, a kill without warning, and two processes as one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pairclip_fast.events import EventLog, read_events
from pairclip_fast.telemetry import timing
from pairclip_fast.train import probing
from pairclip_fast.train.checkpoint import CheckpointStore
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions

PATIENCE_S = 50.0
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry import timing
from pairclip_fast.train import probing
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions

timing.STEP_EVENT_SECONDS = timing.PEAK_SECONDS = probing.PROBE_SECONDS = 0.0
kill_at = int(sys.argv[4])
log = EventLog(None, console=False)
def sink(event):
    if event["event"] == "step" and event["step"] == kill_at and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
log.subscribe(sink)
result = run_train(TrainOptions(data=Path(sys.argv[1]), out=Path(sys.argv[2]), config=Path(sys.argv[3])), events=log)
print(json.dumps(result["metrics"]))
"""


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"the process ended or hangs: {process.communicate()}")
        time.sleep(0.02)


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


@pytest.fixture(scope="module")
def whole(data_template: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
    """The tiny run in this process, uninterrupted; on one thread as the others, whatever the test before this module left."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole-processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "STEP_EVENT_SECONDS", 0.0)
        patch.setattr(probing, "PROBE_SECONDS", 0.0)
        options = TrainOptions(data=data_template, out=folder / "run", config=write_config(folder))
        return folder / "run", run_train(options)


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in logged(run, "step")}


def test_signals_reach_the_command_line(data: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """SIGUSR1 saves and goes on; SIGINT finishes the step, saves, names the command to continue, exits with 130."""
    run = tmp_path / "my run"
    config = write_config(tmp_path, {"train.epochs": 100_000})
    process = start("-m", "pairclip_fast.cli", "train", "--data", data, "--out", run, "--config", config)
    wait_for(lambda: len(logged(run, "checkpoint")) >= 1, process)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(logged(run, "signal")) == 1, process)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert time.monotonic() - sent < 20.0  # 5 s on a machine that does nothing else
    assert f"pairclip-fast train --resume --out '{run}'" in errors
    assert "Traceback" not in errors
    assert [event["name"] for event in logged(run, "signal")] == ["SIGUSR1", "SIGINT"]
    store = CheckpointStore(run / "checkpoints", events=EventLog(None, console=False))
    newest = store.newest()
    assert newest is not None
    assert newest.name == f"step-{logged(run, 'finished')[-1]['step']:08d}"


def test_a_process_killed_without_warning_resumes_to_the_same_end(
    data: Path,
    tmp_path: Path,
    write_config: Callable[..., Path],
    whole: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "STEP_EVENT_SECONDS", 0.0)
    run, config = tmp_path / "killed", write_config(tmp_path)
    process = start("-c", SCRIPT, data, run, config, 7)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL
    assert sorted(losses(run)) == list(range(1, 8))
    run_train(TrainOptions(data=data, out=run, config=config, resume=True))
    assert losses(run) == losses(whole[0])
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (folder / "checkpoints" / "step-00000012" / name for folder in (run, whole[0]))
        assert mine.read_bytes() == theirs.read_bytes()


BUFFERS = """
import os, sys, torch
from torch import nn
from pairclip_fast.train.distributed import join
processes = join()
module = nn.BatchNorm2d(3)
module(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(processes.rank)))
own = module.running_mean.tolist()
processes.share_buffers(module)
print(own != module.running_mean.tolist(), int(module.num_batches_tracked), *module.running_mean.tolist())
processes.leave()
"""


def test_all_processes_evaluate_the_same_batch_statistics() -> None:
    """Each moved its own in the last step."""
    lines = [output.split() for output, _ in in_two_processes("-c", BUFFERS)]
    assert [line[0] for line in lines] == ["False", "True"], "the first one's are everybody's"
    assert lines[0][1:] == lines[1][1:]


def in_two_processes(*arguments: object, codes: tuple[int, int] = (0, 0)) -> list[tuple[str, str]]:
    """What both printed and said; `codes` is how they end."""
    port = str(20_000 + os.getpid() % 30_000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert tuple(process.returncode for process in processes) == codes, outputs
    return outputs


def test_two_processes_are_one(data: Path, tmp_path: Path, write_config: Callable[..., Path], whole: tuple[Path, dict[str, Any]]) -> None:
    """The same losses, the same metrics, one run folder."""
    run, config = tmp_path / "two", write_config(tmp_path)
    outputs = in_two_processes("-c", SCRIPT, data, run, config, -1)
    mine, theirs = losses(run), losses(whole[0])
    assert mine.keys() == theirs.keys()
    assert all(mine[step] == pytest.approx(theirs[step], rel=1e-4) for step in theirs)
    assert mine[1] == pytest.approx(theirs[1], rel=1e-6)
    first, second = (json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1]) for output, _ in outputs)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["num_pairs"] == whole[1]["metrics"]["num_pairs"] == 24
    assert first["loss"] == pytest.approx(whole[1]["metrics"]["loss"], rel=1e-3)
    started = logged(run, "run_started")
    assert len(started) == 1
    assert len(logged(run, "finished")) == 1


RELAY = """
import json
from pairclip_fast.events import EventLog
from pairclip_fast.train.distributed import join
from pairclip_fast.train.relay import Relay
processes = join()
log = EventLog(None, console=processes.is_first)
log.subscribe(lambda event: print(json.dumps(event)))
relay = Relay(processes, events=log)
def met(key):
    log.emit("bad_record", shard="000.tar", offset=1000, key=key, reason="cut short", policy="skip")
log.fallback("JPEG", chosen="pillow", reason="no libjpeg")
log.fallback("kernels", chosen="torch", reason=f"processor {processes.rank}")
met("everybody's")
if processes.rank == 1:
    met("its own")
for _ in range(2):
    relay.tell()
processes.leave()
"""


def test_what_only_another_process_has_met_is_told_by_the_first_once() -> None:
    (output, said), (_, nothing) = in_two_processes("-c", RELAY)
    told = [json.loads(line) for line in output.splitlines()][3:]  # after its own
    assert [(event["event"], event.get("process"), event.get("reason"), event.get("key")) for event in told] == [
        ("fallback", None, "process 1: processor 1", None),
        ("bad_record", 1, "cut short", "its own"),
    ]
    assert "process 1: bad record 000.tar, byte 1,000, its own: cut short; policy: skip" in said
    assert nothing == ""


def test_that_the_other_process_is_gone_is_said_and_nothing_is_lost(data: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    run, config = tmp_path / "run", write_config(tmp_path)
    (_, first), _ = in_two_processes("-c", SCRIPT, data, run, config, 6, codes=(1, -signal.SIGKILL))
    assert "another process of the run has ended" in first.splitlines()[-1] or "LostProcessError" in first
    last = logged(run, "finished")[-1]
    assert last["reason"] == "failed"
    assert last["error"].startswith("another process of the run has ended")
    assert logged(run, "checkpoint")[-1]["step"] == 6


PLAN = """
import json, sys
from pathlib import Path
from pairclip_fast.train.commands import run_train
from pairclip_fast.train.options import TrainOptions
options = TrainOptions(data=Path(sys.argv[1]), out=Path(sys.argv[2]), config=Path(sys.argv[3]), dry_run=True, memory_budget=sys.argv[4])
print(json.dumps(run_train(options)))
"""


def test_two_processes_plan_for_two(data: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """Each has half the pairs: what it must hold is that of half the batch."""
    run, config = tmp_path / "run", write_config(tmp_path)
    (output, said), _ = in_two_processes("-c", PLAN, data, run, config, "100GiB")
    assert json.loads(output)["plan"]["steps_per_epoch"] == 4
    assert "8 pairs at a time" in said
    assert not run.exists()


def test_a_batch_that_two_processes_cannot_share_leaves_nothing_behind(
    data: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    run, config = tmp_path / "run", write_config(tmp_path, {"train.batch_size": 15})
    (_, first), _ = in_two_processes("-c", SCRIPT, data, run, config, -1, codes=(1, 1))
    assert "the batch does not divide evenly" in first
    assert "use --batch-size 14" in first
    assert not run.exists()
