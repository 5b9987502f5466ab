"""Checkpoints on disk: written aside, fsynced, renamed; found by scanning and verifying; nothing in them is trusted.

    checkpoints/step-00001200/{model.safetensors, optimizer.safetensors, state.json, MANIFEST.json}

A crash at any operation leaves the previous whole checkpoint or the new one. The manifest holds size and SHA-256 of each
file; a folder that does not match is moved to `step-X.damaged`, with an event, and the one before is taken. There is no
`latest` pointer that could dangle: the newest whole one is the latest. Hashing costs about 1 ms per MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pairclip_fast.errors import CheckpointError, StorageError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL, FileSystem, commit_folder, sha256_file, storage_errors
from pairclip_fast.train.tensors import DamagedError, read_header, read_tensors, to_bytes

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
FILES = (MODEL, OPTIMIZER, STATE)
NAME = re.compile(r"step-(\d{8})")
JSON_LIMIT_BYTES = 1 << 20
KEEP_LATEST = 2
TEMPORARY, TRASH, REPLACED = ".tmp-", ".trash-", ".replaced-"
"""Prefixes of folders that are not checkpoints: being written, being deleted, and about to be replaced by the same step."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: tensors by name, and everything else as JSON values."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    """The optimizer step that a checkpoint's name stands for."""
    return int(name.removeprefix("step-"))


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The run's `checkpoints` folder; made when first needed.
        events: Told about damage found.
        fs: File operations; the tests hand in one that crashes.
    """

    def __init__(self, folder: Path, *, events: EventLog, fs: FileSystem = REAL) -> None:
        self.folder = folder
        self._events = events
        self._fs = fs
        self._numbers = itertools.count()

    def names(self) -> list[str]:
        """Names of all checkpoints, whole or not, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((entry.name for entry in self.folder.iterdir() if NAME.fullmatch(entry.name)), reverse=True)

    def save(self, snapshot: Snapshot, *, step: int, best: str | None) -> Path:
        """Write a checkpoint, then delete those that are neither among the latest two nor `best`.

        Raises:
            StorageError: no space, or the disk failed; the checkpoints that were there are untouched.
        """
        final = self.folder / checkpoint_name(step)
        needed = sum(tensor.nbytes for tensors in (snapshot.model, snapshot.optimizer) for tensor in tensors.values())
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}-{next(self._numbers)}"
        with _said_with_size(needed), storage_errors(final):
            try:
                self._write(temporary, snapshot, step=step)
                self._move_aside(final)
                commit_folder(temporary, final, fs=self._fs)
            except BaseException as error:
                if isinstance(error, Exception):  # a crash does not clean up; neither may its simulation
                    self._fs.remove_tree(temporary)
                    self._recover()
                raise
        try:
            self._discard(self.folder / f"{REPLACED}{final.name}")
            self.prune(best=best)
        except OSError as error:
            self._events.note(f"old checkpoints could not be deleted: {error}")
        return final

    def save_or_make_room(self, snapshot: Snapshot, *, step: int, best: str | None) -> Path:
        """Like `save`; if the disk is full, try once more with only the latest checkpoint and the best one kept.

        Raises:
            StorageError: it failed again.
        """
        try:
            return self.save(snapshot, step=step, best=best)
        except StorageError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or len(self.names()) < 2:
                raise
            self._events.note(f"no space for the checkpoint of step {step}: deleting older ones")
            with storage_errors(self.folder):
                self.prune(best=best, keep=1)
            return self.save(snapshot, step=step, best=best)

    def prune(self, *, best: str | None, keep: int = KEEP_LATEST) -> None:
        """Delete all checkpoints but the latest `keep` and `best`; renamed first, so that none is ever seen half deleted."""
        for name in self.names()[keep:]:
            if name != best:
                self._discard(self.folder / name)

    def clean(self) -> None:
        """Remove what an earlier process left unfinished. Only for the owner of the run's lock."""
        if not self.folder.is_dir():
            return
        with storage_errors(self.folder):
            self._recover()
            for entry in list(self.folder.iterdir()):
                if entry.name.startswith((TEMPORARY, TRASH)):
                    self._fs.remove_tree(entry)

    def whole(self, name: str) -> Path | None:
        """The checkpoint `name` if it is there and whole; otherwise None and an event."""
        try:
            if NAME.fullmatch(name) is None:
                raise DamagedError("not a checkpoint's name")
            verify(self.folder / name)
        except (DamagedError, OSError) as error:
            self._events.fallback("best checkpoint", chosen="the newest one", reason=f"{name}: {error}")
            return None
        return self.folder / name

    def newest(self, *, quarantine: bool = True) -> Path | None:
        """The newest whole checkpoint, or None if the run has none yet.

        Args:
            quarantine: Move damaged ones to `step-X.damaged`; False leaves the folder as it is.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or the newest whole one has another format version.
        """
        damaged: list[str] = []
        for name in self.names():
            try:
                verify(self.folder / name)
            except DamagedError as error:
                damaged.append(f"{name}: {error}")
                if quarantine:
                    self._quarantine(self.folder / name)
                continue
            for reason in damaged:
                self._events.fallback("checkpoint", chosen=name, reason=f"damaged {reason}")
            return self.folder / name
        if damaged or any(self.folder.glob("*.damaged*")):
            got = "\n".join(damaged) or "only damaged ones, set aside earlier"
            raise CheckpointError("no checkpoint of this run is whole", where=self.folder, got=got, fix="start again in another --out")
        return None

    def _write(self, temporary: Path, snapshot: Snapshot, *, step: int) -> None:
        parent = next((checkpoint_step(name) for name in self.names()), None)
        self._fs.mkdir(temporary)
        self._fs.fsync_folder(self.folder.parent)
        contents = {
            MODEL: to_bytes(snapshot.model),
            OPTIMIZER: to_bytes(snapshot.optimizer),
            STATE: json.dumps(snapshot.state, indent=1, sort_keys=True, allow_nan=False).encode(),
        }
        files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
        contents[MANIFEST] = json.dumps({"format": FORMAT, "step": step, "parent": parent, "files": files}, indent=1).encode()
        for name, data in contents.items():
            with self._fs.open_for_writing(temporary / name) as file:
                self._fs.write(file, data)
                self._fs.fsync(file)

    def _move_aside(self, final: Path) -> None:
        """Make room for a second checkpoint of the same step (saved on a signal, then again after the evaluation)."""
        if final.exists():
            replaced = final.with_name(f"{REPLACED}{final.name}")
            self._fs.remove_tree(replaced)
            self._fs.rename(final, replaced)

    def _recover(self) -> None:
        """Finish or undo a replacement that was interrupted."""
        for entry in list(self.folder.glob(f"{REPLACED}*")):
            name = entry.name.removeprefix(REPLACED)
            if (self.folder / name).exists():
                self._discard(entry)
            else:
                self._fs.rename(entry, self.folder / name)
                self._fs.fsync_folder(self.folder)

    def _discard(self, path: Path) -> None:
        if path.exists():
            trash = path.with_name(f"{TRASH}{path.name}-{os.getpid()}-{next(self._numbers)}")
            self._fs.rename(path, trash)
            self._fs.remove_tree(trash)

    def _quarantine(self, path: Path) -> None:
        target = path.with_name(f"{path.name}.damaged")
        for number in itertools.count(2):
            if not os.path.lexists(target):
                break
            target = path.with_name(f"{path.name}.damaged-{number}")
        with storage_errors(target):
            self._fs.rename(path, target)
            self._fs.fsync_folder(self.folder)


@contextlib.contextmanager
def _said_with_size(needed: int) -> Iterator[None]:
    """Add to a `StorageError` how much room there should have been."""
    try:
        yield
    except StorageError as error:
        what, where, got, fix = error.what, error.where, error.got, error.fix
        raise StorageError(what, where=where, expected=f"about {needed:,} bytes free", got=got, fix=fix) from error.__cause__


def verify(path: Path) -> None:
    """Check that a checkpoint folder is whole: its files, sizes, digests, tensor headers, and nothing but plain files.

    Raises:
        DamagedError: it is not.
        CheckpointError: it is of another format version.
    """
    if path.is_symlink() or not path.is_dir():
        raise DamagedError("not a plain folder")
    for entry in path.iterdir():
        if not stat.S_ISREG(entry.lstat().st_mode):
            raise DamagedError(f"{entry.name!r} is not a plain file")
    manifest = _read_json(path / MANIFEST)
    if type(manifest.get("format")) is int and manifest["format"] != FORMAT:
        raise CheckpointError("the checkpoint has another format version", where=path, expected=FORMAT, got=manifest["format"])
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or set(files) != set(FILES):
        raise DamagedError(f"{MANIFEST} is malformed")
    for name in FILES:  # never a name from the manifest
        file, expected = path / name, files[name]
        if not file.exists() or not isinstance(expected, dict):
            raise DamagedError(f"{name} is missing")
        if file.stat().st_size != expected.get("bytes"):
            raise DamagedError(f"{name} has {file.stat().st_size:,} bytes instead of {expected.get('bytes')}")
    for name in FILES:
        if sha256_file(path / name) != files[name].get("sha256"):
            raise DamagedError(f"{name} has another digest than {MANIFEST} says")
    read_header(path / MODEL)
    read_header(path / OPTIMIZER)
    _read_json(path / STATE)


def load(path: Path, *, optimizer: bool = True) -> Snapshot:
    """The content of a checkpoint that was verified.

    Args:
        path: The checkpoint's folder.
        optimizer: Read the optimizer state too; evaluation does not need it.

    Raises:
        CheckpointError: a file is malformed all the same, or holds values that are not finite.
    """
    try:
        tensors = read_tensors(path / OPTIMIZER) if optimizer else {}
        return Snapshot(model=read_tensors(path / MODEL), optimizer=tensors, state=_read_json(path / STATE))
    except (DamagedError, OSError) as error:
        raise CheckpointError("the checkpoint cannot be used", where=path, got=error) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON table."""
    try:
        if path.stat().st_size > JSON_LIMIT_BYTES:
            raise DamagedError(f"{path.name} is implausibly large")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path.name} is no table")
    return value
