"""Checkpoints against crashes at every operation, damaged files and hostile ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import time
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from dying_disk import DyingDisk, PowerCut

from pairclip_fast.errors import CheckpointError, StorageError
from pairclip_fast.events import Event, EventLog
from pairclip_fast.storage import FileSystem
from pairclip_fast.train.checkpoint import FILES, MANIFEST, MODEL, OPTIMIZER, STATE, CheckpointStore, Snapshot, load, verify
from pairclip_fast.train.tensors import DamagedError, read_header, to_bytes


def snapshot(step: int) -> Snapshot:
    weights = torch.full((4, 3), float(step))
    state = {"progress": {"step": step}, "value": 0.1 + step}
    return Snapshot(model={"module.w": weights, "module.scale": torch.tensor(1.5)}, optimizer={"w/exp_avg": weights / 3}, state=state)


def saved_step(path: Path | None) -> int | None:
    """The step of a whole checkpoint, checked to hold what was saved at that step."""
    if path is None:
        return None
    found = load(path)
    step: int = found.state["progress"]["step"]
    wanted = snapshot(step)
    assert found.state == wanted.state
    for mine, theirs in ((found.model, wanted.model), (found.optimizer, wanted.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return step


def store_in(folder: Path, events: EventLog, fs: FileSystem | None = None) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", events=events, **({} if fs is None else {"fs": fs}))


def test_what_is_saved_is_loaded(tmp_path: Path, events: EventLog) -> None:
    store = store_in(tmp_path, events)
    assert store.newest() is None
    assert saved_step(store.save(snapshot(3), step=3, best=None)) == 3
    assert sorted(path.name for path in (store.folder / "step-00000003").iterdir()) == sorted([*FILES, MANIFEST])
    assert load(store.folder / "step-00000003", optimizer=False).optimizer == {}


def test_two_latest_and_the_best_are_kept(tmp_path: Path, events: EventLog) -> None:
    store = store_in(tmp_path, events)
    for step in range(1, 7):
        store.save(snapshot(step), step=step, best="step-00000002" if step >= 2 else None)
    assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000002", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("power_loss", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, events: EventLog, power_loss: bool, again: bool) -> None:
    """Also of a second save of the same step, which replaces a folder."""
    template = tmp_path / "template"
    for step in (1, 2, 3):
        store_in(template, events).save(snapshot(step), step=step, best=None)
    step, outcomes = (3 if again else 4), []
    for last in range(200):
        folder = tmp_path / f"run{last}"
        shutil.copytree(template, folder)
        disk = DyingDisk(last)
        try:
            store_in(folder, events, disk).save(snapshot(step), step=step, best="step-00000002")
            finished = True
        except PowerCut:
            finished = False
        if power_loss:
            disk.lose_power()
        fresh = store_in(folder, events)
        fresh.clean()
        outcomes.append(saved_step(fresh.newest()))
        assert {path.name[:5] for path in fresh.folder.iterdir()} == {"step-"}
        assert len(fresh.names()) >= 2
        store_in(folder, events).save(snapshot(5), step=5, best=None)
        assert saved_step(store_in(folder, events).newest()) == 5
        shutil.rmtree(folder)
        if finished:
            break
    assert finished
    assert len(outcomes) > 15
    assert set(outcomes) == {3, step}
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("mutant", ["no fsync", "manifest off"])
def test_the_crash_test_catches_a_wrong_writer(tmp_path: Path, events: EventLog, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fsync, or with a reader that does not check, a power cut yields a checkpoint that cannot be used."""
    disk = DyingDisk()
    if mutant == "no fsync":
        monkeypatch.setattr(disk, "fsync", lambda file: file.flush())
    store_in(tmp_path, events, disk).save(snapshot(1), step=1, best=None)
    if mutant == "manifest off":
        path = tmp_path / "checkpoints" / "step-00000001" / MODEL
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        monkeypatch.setattr("pairclip_fast.train.checkpoint.verify", lambda path: None)
        with pytest.raises(AssertionError):
            saved_step(store_in(tmp_path, events).newest())
        return
    disk.lose_power()
    with pytest.raises(CheckpointError):
        store_in(tmp_path, events).newest()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "flipped", "grown"])
def test_a_damaged_file_is_set_aside_and_the_one_before_taken(
    tmp_path: Path, events: EventLog, recorded: list[Event], name: str, kind: str
) -> None:
    store = store_in(tmp_path, events)
    for step in (1, 2):
        store.save(snapshot(step), step=step, best=None)
    file = store.folder / "step-00000002" / name
    data = file.read_bytes()
    middle = len(data) // 2
    changed = {
        "empty": b"",
        "truncated": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "grown": data + b"x",
    }
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(changed[kind])
    assert store.newest(quarantine=False) == store.folder / "step-00000001"
    assert (store.folder / "step-00000002").exists()
    assert saved_step(store.newest()) == 1
    assert (store.folder / "step-00000002.damaged").is_dir()
    assert [event["chosen"] for event in recorded if event["event"] == "fallback"] == ["step-00000001"]
    assert saved_step(store.newest()) == 1


def test_every_flipped_byte_is_found(tmp_path: Path, events: EventLog) -> None:
    path = store_in(tmp_path, events).save(snapshot(1), step=1, best=None)
    for name in (*FILES, MANIFEST):
        data = (path / name).read_bytes()
        for position in range(0, len(data), max(len(data) // 100, 1)):
            changed = bytearray(data)
            changed[position] ^= 0x20
            (path / name).write_bytes(changed)
            if name != MANIFEST or _means_something_else(bytes(changed), data):
                with pytest.raises((DamagedError, CheckpointError)):
                    verify(path)
        (path / name).write_bytes(data)
    verify(path)


def _means_something_else(changed: bytes, original: bytes) -> bool:
    """Bytes of the manifest that nothing reads: the step, the parent, white space."""
    try:
        new, old = json.loads(changed), json.loads(original)
    except ValueError:
        return True
    return any(new.get(key) != old[key] for key in ("format", "files"))


def test_none_whole_is_an_error_and_stays_one(tmp_path: Path, events: EventLog) -> None:
    store = store_in(tmp_path, events)
    store.save(snapshot(1), step=1, best=None)
    (store.folder / "step-00000001" / MODEL).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            store.newest()
        assert caught.value.exit_code == 4


def forge(path: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint together with the right size and digest."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def header(entries: dict[str, Any], payload: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "huge header": struct.pack("<Q", 2**40) + b"{}",
    "header beyond the limit": struct.pack("<Q", 5 << 20) + b" " * (6 << 20),
    "no header": b"\x08",
    "overlap": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "gap": header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "outside": header({"a": entry(0, 400, [100])}, bytes(4)),
    "trailing": header({"a": entry(0, 4, [1])}, bytes(8)),
    "wrong size": header({"a": entry(0, 4, [2**40])}, bytes(4)),
    "negative": header({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "float offsets": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)),
    "unknown dtype": header({"a": entry(0, 4, [1], "X9")}, bytes(4)),
    "duplicate": struct.pack("<Q", 2 * 52 + 3)
    + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'[: 2 * 52 + 3]
    + bytes(4),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "no table": struct.pack("<Q", 2) + b"[]",
    "many keys": header({f"{number}": entry(0, 0, [0]) for number in range(80_000)}),
}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("kind", [*HOSTILE, "pickle"])
def test_a_hostile_tensor_file_is_refused_quickly_and_nothing_runs(tmp_path: Path, events: EventLog, kind: str, name: str) -> None:
    """Its digest is right: only the file itself tells."""
    store = store_in(tmp_path, events)
    path = store.save(snapshot(1), step=1, best=None)
    canary = tmp_path / "canary"
    forge(path, name, pickle.dumps(Bomb(canary)) if kind == "pickle" else HOSTILE[kind])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError):
        store.newest()
    assert time.monotonic() - started < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert not canary.exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path, events: EventLog) -> None:
    path = store_in(tmp_path, events).save(snapshot(1), step=1, best=None)
    forge(path, MODEL, to_bytes({"module.w": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(CheckpointError, match="not finite"):
        load(path)


def test_symlinks_are_not_followed(tmp_path: Path, events: EventLog) -> None:
    store = store_in(tmp_path, events)
    path = store.save(snapshot(1), step=1, best=None)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(path / MODEL, elsewhere)
    (path / MODEL).symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="plain"):
        verify(path)
    shutil.move(elsewhere, tmp_path / "x")
    (store.folder / "step-00000009").symlink_to(tmp_path)
    with pytest.raises(CheckpointError):
        store.newest()
    assert (tmp_path / "x").exists()


def test_hostile_json_is_damage(tmp_path: Path, events: EventLog) -> None:
    for name, data in ((STATE, b"[" * 100_000), (STATE, b" " * (2 << 20)), (STATE, b"[]"), (STATE, b"\xff")):
        store = store_in(tmp_path / hashlib.sha256(data).hexdigest(), events)
        forge(store.save(snapshot(1), step=1, best=None), name, data)
        with pytest.raises(CheckpointError):
            store.newest()


def test_names_in_the_manifest_are_never_used_as_paths(tmp_path: Path, events: EventLog) -> None:
    path = store_in(tmp_path, events).save(snapshot(1), step=1, best=None)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"]["../../secret"] = manifest["files"][MODEL]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedError):
        verify(path)


def test_another_format_version_is_no_damage(tmp_path: Path, events: EventLog) -> None:
    store = store_in(tmp_path, events)
    path = store.save(snapshot(1), step=1, best=None)
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="format version"):
        store.newest()
    assert path.is_dir()


class FullDisk(FileSystem):
    """Writes of model files fail for lack of space until `failures` are used up."""

    def __init__(self, failures: int, *, code: int = errno.ENOSPC) -> None:
        self.failures, self.code = failures, code

    def write(self, file: IO[bytes], data: bytes | memoryview) -> None:
        if self.failures and Path(file.name).name == OPTIMIZER:
            self.failures -= 1
            raise OSError(self.code, os.strerror(self.code))
        super().write(file, data)


def test_a_full_disk_leaves_the_old_checkpoints_and_no_rest(tmp_path: Path, events: EventLog) -> None:
    for step in (1, 2):
        store_in(tmp_path, events).save(snapshot(step), step=step, best=None)
    full = store_in(tmp_path, events, FullDisk(1))
    with pytest.raises(StorageError, match=r"about 100 bytes free[\s\S]*bytes free") as caught:
        full.save(snapshot(3), step=3, best=None)
    assert caught.value.exit_code == 8
    assert full.names() == ["step-00000002", "step-00000001"]
    assert len(list(full.folder.iterdir())) == 2


def test_room_is_made_once(tmp_path: Path, events: EventLog, recorded: list[Event]) -> None:
    for step in (1, 2, 3):
        store_in(tmp_path, events).save(snapshot(step), step=step, best="step-00000001")
    store = store_in(tmp_path, events, FullDisk(1))
    assert saved_step(store.save_or_make_room(snapshot(4), step=4, best="step-00000001")) == 4
    assert store.names() == ["step-00000004", "step-00000003", "step-00000001"]
    assert any("no space" in event["message"] for event in recorded if event["event"] == "note")
    with pytest.raises(StorageError):
        store_in(tmp_path, events, FullDisk(2)).save_or_make_room(snapshot(5), step=5, best="step-00000001")
    assert saved_step(store.newest()) == 4


def test_an_io_error_of_fsync_is_never_called_saved(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path, events)
    store.save(snapshot(1), step=1, best=None)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileSystem, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output"):
        store.save_or_make_room(snapshot(2), step=2, best=None)
    assert store.names() == ["step-00000001"]


def test_the_best_checkpoint_is_checked_too(tmp_path: Path, events: EventLog, recorded: list[Event]) -> None:
    store = store_in(tmp_path, events)
    path = store.save(snapshot(1), step=1, best=None)
    assert store.whole("step-00000001") == path
    assert store.whole("step-00000007") is None
    assert store.whole("../../etc") is None
    (path / STATE).write_bytes(b"{}")
    assert store.whole("step-00000001") is None
    assert len(recorded) == 3


def test_headers_tell_shapes_without_reading_tensors(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(to_bytes({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}))
    found = read_header(tmp_path / "t.safetensors")
    assert found["a"] == ((2, 3), torch.float32)
    assert found["b"] == ((), torch.int64)
