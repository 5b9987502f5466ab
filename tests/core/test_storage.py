"""The commit rule, tried against a disk that dies at every operation and forgets whatever was not synced.

Deliberately wrong writers (no fsync, rename first, in place) must be caught by the same check.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from dying_disk import DyingDisk, PowerCut

from pairclip_fast.errors import RunBusyError, StorageError
from pairclip_fast.storage import REAL, FileSystem, FolderLock, commit_folder, locked_beside, sha256_file, write_atomic, write_json

OLD, NEW = b"old content", b"new content, and longer"
Writer = Callable[[Path, FileSystem], None]


def write_with_storage(path: Path, fs: FileSystem) -> None:
    write_atomic(path, NEW, fs=fs)


def write_without_fsync(path: Path, fs: FileSystem) -> None:
    temporary = path.with_name(".aside")
    with fs.open_for_writing(temporary) as file:
        fs.write(file, NEW)
    fs.rename(temporary, path)
    fs.fsync_folder(path.parent)


def write_without_folder_fsync(path: Path, fs: FileSystem) -> None:
    temporary = path.with_name(".aside")
    with fs.open_for_writing(temporary) as file:
        fs.write(file, NEW)
        fs.fsync(file)
    fs.rename(temporary, path)


def write_in_place(path: Path, fs: FileSystem) -> None:
    with fs.open_for_writing(path) as file:
        fs.write(file, NEW)
        fs.fsync(file)
    fs.fsync_folder(path.parent)


def rename_before_write(path: Path, fs: FileSystem) -> None:
    temporary = path.with_name(".aside")
    with fs.open_for_writing(temporary) as file:
        fs.rename(temporary, path)
        fs.write(file, NEW)
        fs.fsync(file)
    fs.fsync_folder(path.parent)


def violations(writer: Writer, folder: Path, *, existed: bool) -> list[str]:
    """Every way in which a crash of `writer` leaves something other than the whole old or the whole new file."""
    found: list[str] = []
    for last, cut in itertools.product(range(100), ("process killed", "power cut, renames lost", "power cut, renames kept")):
        attempt = folder / f"{writer.__name__}-{existed}-{last}-{cut[-4:]}"
        attempt.mkdir()
        path = attempt / "file"
        if existed:
            path.write_bytes(OLD)
        disk = DyingDisk(last)
        try:
            writer(path, disk)
            finished = True
        except PowerCut:
            finished = False
        if cut != "process killed":
            disk.lose_power(renames_reached_the_disk=cut.endswith("kept"))
        content = path.read_bytes() if path.exists() else None
        allowed = [NEW] if finished else [NEW, OLD if existed else None]
        if content not in allowed:
            found.append(f"{cut} after operation {last}: {content!r}")
        if finished and cut == "power cut, renames kept":
            return found
    raise AssertionError("the writer never finished")


@pytest.mark.parametrize("existed", [True, False])
def test_write_atomic_survives_a_crash_at_every_operation(tmp_path: Path, existed: bool) -> None:
    assert violations(write_with_storage, tmp_path, existed=existed) == []


@pytest.mark.parametrize("wrong", [write_without_fsync, write_without_folder_fsync, write_in_place, rename_before_write])
def test_wrong_writers_are_caught(tmp_path: Path, wrong: Writer) -> None:
    assert violations(wrong, tmp_path, existed=True)


def test_a_crashed_write_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(PowerCut):
        write_atomic(path, OLD, fs=DyingDisk(3))
    write_atomic(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("operation", ["open_for_writing", "write", "fsync", "rename"])
def test_a_failing_disk_is_a_storage_error_and_leaves_nothing_behind(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(OLD)
    disk = FileSystem()
    monkeypatch.setattr(disk, operation, fail)
    with pytest.raises(StorageError, match="No space left") as failure:
        write_atomic(path, NEW, fs=disk)
    assert failure.value.exit_code == 8
    assert str(path) in str(failure.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == OLD


def test_a_failing_folder_sync_is_never_called_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> None:
        raise OSError(5, "Input/output error")

    disk = FileSystem()
    monkeypatch.setattr(disk, "fsync_folder", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        write_atomic(tmp_path / "file", NEW, fs=disk)


def test_write_json_is_deterministic_ascii(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "\u00e9"})
    write_json(tmp_path / "b.json", {"a": "\u00e9", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_bytes().isascii()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "\u00e9", "b": 1}


@pytest.mark.parametrize("last", range(4))
def test_commit_folder_is_absent_or_whole(tmp_path: Path, last: int) -> None:
    aside, final = tmp_path / ".tmp-folder", tmp_path / "final"
    aside.mkdir()
    (aside / "file").write_bytes(NEW)
    disk = DyingDisk(last)
    try:
        commit_folder(aside, final, fs=disk)
        assert final.is_dir()
    except PowerCut:
        pass
    assert not final.exists() or (final / "file").read_bytes() == NEW


def test_sha256_file_reads_all_chunks(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_second_process_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from pairclip_fast.storage import FolderLock\nFolderLock(Path(sys.argv[1]))"
    with FolderLock(tmp_path):
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "RunBusyError" in run.stderr
    assert f"pid {os.getpid()} on " in run.stderr


@pytest.mark.parametrize("folder", ["plain", "plain/x"])
def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "plain").write_bytes(OLD)
    with pytest.raises(StorageError, match="writing failed") as failure:
        FolderLock(tmp_path / folder)
    assert str(tmp_path / folder) in str(failure.value)


def test_lock_ends_with_its_process_and_after_release(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pairclip_fast.storage import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert run.returncode == -9
    lock = FolderLock(tmp_path)
    with pytest.raises(RunBusyError) as refusal:
        FolderLock(tmp_path)
    assert refusal.value.exit_code == 6
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()


def test_a_lock_beside_a_folder_leaves_no_file(tmp_path: Path) -> None:
    with locked_beside(tmp_path / "data"):
        with pytest.raises(RunBusyError, match=f"pid {os.getpid()} on "), locked_beside(tmp_path / "data"):
            pass
        with locked_beside(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_just_removed_by_its_owner_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = fcntl.flock, []

    def late(file: IO[str], operation: int) -> None:
        if not calls:
            (tmp_path / ".data.lock").unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked_beside(tmp_path / "data"), pytest.raises(RunBusyError), locked_beside(tmp_path / "data"):
        pass
    assert len(calls) == 3


def test_the_real_file_system_is_the_default(tmp_path: Path) -> None:
    assert type(REAL) is FileSystem
    write_atomic(tmp_path / "deep" / "folder" / "file", NEW)
    assert (tmp_path / "deep" / "folder" / "file").read_bytes() == NEW
