"""Everything that must survive a crash: atomic files and folders, digests, locks.

The commit rule is the same for a file and a folder: write aside, fsync the content, rename, fsync the parent. A reader
therefore meets the old state or the new one, never a mixture. All writes that matter go through a `FileSystem`, so the
tests can hand in one that dies at the n-th operation or forgets what was not fsynced.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pairclip_fast.errors import RunBusyError, StorageError

CHUNK_BYTES = 1 << 20


class FileSystem:
    """The eight operations that durability rests on. Tests replace it; nothing else should."""

    def open_for_writing(self, path: Path) -> IO[bytes]:
        return path.open("wb")

    def write(self, file: IO[bytes], data: bytes | memoryview) -> None:
        file.write(data)

    def fsync(self, file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    def fsync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


REAL = FileSystem()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the disk into our `StorageError`, naming `path` and the space that is left."""
    try:
        yield
    except OSError as error:
        parent = next(p for p in (path, *path.parents) if os.path.exists(p))  # noqa: PTH110  (False where we may not look)
        free = shutil.disk_usage(parent).free
        raise StorageError(
            f"writing failed: {error.strerror or error}",
            where=path,
            got=f"{free:,} bytes free",
            fix="free some space or choose another folder",
        ) from error


def write_atomic(path: Path, data: bytes, *, fs: FileSystem = REAL) -> None:
    """Replace `path` by `data`; after a crash the file holds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with storage_errors(path):
        fs.mkdir(path.parent)
        try:
            with fs.open_for_writing(temporary) as file:
                fs.write(file, data)
                fs.fsync(file)
            fs.rename(temporary, path)
        except OSError:
            fs.unlink(temporary)
            raise
        fs.fsync_folder(path.parent)


def write_json(path: Path, value: Any, *, fs: FileSystem = REAL) -> None:
    """`value` as indented JSON with sorted keys, atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n", fs=fs)


def commit_folder(temporary: Path, final: Path, *, fs: FileSystem = REAL) -> None:
    """Give a folder whose files are already fsynced its final name."""
    with storage_errors(final):
        fs.fsync_folder(temporary)
        fs.rename(temporary, final)
        fs.fsync_folder(final.parent)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class FolderLock:
    """Exclusive ownership of a folder for the life of a process, released by the kernel however the process ends.

    `flock` rather than a pid file: there is no stale lock to guess about. Children do not inherit it (the descriptor is
    close-on-exec) unless they were forked, in which case the run is indeed still alive.

    Raises:
        RunBusyError: another process holds the lock; the message names its pid, host and start time.
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _lock(self.path, what="the run folder is in use by another process", where=folder)

    def release(self) -> None:
        """Let the next process in. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def locked_beside(folder: Path) -> Iterator[None]:
    """Exclusive ownership of a folder that is replaced as a whole: like `FolderLock`, with a file beside it that goes at the end.

    Raises:
        RunBusyError: another process holds the lock; the message names its pid, host and start time.
    """
    path = folder.with_name(f".{folder.name}.lock")
    file = _lock(path, what="another process is writing this folder", where=folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path, *, what: str, where: Path) -> IO[str]:
    """The locked file `path`, which says who holds it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise RunBusyError(what, where=where, got=owner, fix="wait for it, or choose another --out") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner removed it after we had opened it: this lock keeps nobody out
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}")
    file.flush()
    return file
