"""Fetches the CIFAR-100 archive from its publisher, once, with its checksum verified before it gets its name.

Having no network must be quick: the name look-up has no timeout of its own, so the connection is opened in a thread that
is given up after a few seconds. The read timeout afterwards is longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pairclip_fast.data.sources.auto import cache_folder
from pairclip_fast.data.sources.cifar100 import ARCHIVE_MD5, md5_file
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL, FileSystem, storage_errors

NAME = "cifar-100-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{NAME}"
CONNECT_SECONDS = 3.0
OPEN_SECONDS = 6.0
"""For look-up, connection, TLS and the first byte together."""
READ_SECONDS = 30.0
EXPECTED_BYTES = 169_001_437
MAX_BYTES = 2 * EXPECTED_BYTES
CHUNK_BYTES = 1 << 20
FIX = "give a local copy with --path, or use --source shapes"


@runtime_checkable
class Response(Protocol):
    """All that we ask of an answer."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


Opener = Callable[[str], Response]


class _PatientConnection(http.client.HTTPSConnection):
    """Short patience for connecting, longer for reading."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_SECONDS)


class _PatientHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PatientConnection, req)


def open_url(url: str) -> Response:
    """The response to a GET, in a few seconds or not at all.

    Raises:
        OSError: no connection, or an HTTP error.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(urllib.request.build_opener(_PatientHandler()).open(url, timeout=CONNECT_SECONDS))
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:  # RuntimeError: sockets blocked by a test
            outcome.append(error)

    thread = threading.Thread(target=work, name="download-open", daemon=True)
    thread.start()
    thread.join(OPEN_SECONDS)
    if not outcome:
        raise OSError(f"no answer within {OPEN_SECONDS:.0f} s")
    if isinstance(outcome[0], BaseException):
        raise OSError(str(getattr(outcome[0], "reason", outcome[0])) or type(outcome[0]).__name__) from outcome[0]
    response: Response = outcome[0]
    return response


def fetch_cifar100(
    *, events: EventLog, folder: Path | None = None, opener: Opener = open_url, md5: str = ARCHIVE_MD5[NAME], fs: FileSystem = REAL
) -> Path:
    """The path of the verified archive in the cache, downloading it if it is not there.

    Args:
        events: For progress.
        folder: Where to keep it; default: the user's cache.
        opener: Opens an address.
        md5: What the file must have.
        fs: Where durability comes from.

    Raises:
        EnvironmentLackingError: no network, or what came is not the archive.
        StorageError: the cache cannot be written.
    """
    target = (folder or cache_folder()) / NAME
    if target.is_file() and md5_file(target) == md5:
        return target
    temporary = target.with_name(f".{NAME}.tmp-{os.getpid()}")
    try:
        with contextlib.closing(opener(URL)) as response, storage_errors(target):
            fs.mkdir(target.parent)
            digest = _copy(response, temporary, events=events, fs=fs)
    except (OSError, http.client.HTTPException) as error:
        fs.unlink(temporary)
        raise EnvironmentLackingError(f"CIFAR-100 could not be downloaded: {error}", where=URL, fix=FIX) from error
    except BaseException:
        fs.unlink(temporary)
        raise
    if digest != md5:
        fs.unlink(temporary)
        what = "what was downloaded is not the published archive"
        raise EnvironmentLackingError(what, where=URL, expected=f"MD5 {md5}", got=digest, fix=FIX)
    with storage_errors(target):
        fs.rename(temporary, target)
        fs.fsync_folder(target.parent)
    return target


def _copy(response: Response, temporary: Path, *, events: EventLog, fs: FileSystem) -> str:
    """Write the response to a file; its MD5."""
    digest, received = hashlib.md5(usedforsecurity=False), 0
    with fs.open_for_writing(temporary) as file, events.progress("downloading CIFAR-100", EXPECTED_BYTES, unit="bytes") as advance:
        while received <= MAX_BYTES and (chunk := _read(response)):
            received += len(chunk)
            digest.update(chunk)
            fs.write(file, chunk)
            advance(len(chunk))
        fs.fsync(file)
    return digest.hexdigest()


class _NetworkError(http.client.HTTPException):
    """Reading stopped: told apart from a disk that failed, which is an OSError too."""


def _read(response: Response) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except OSError as error:
        raise _NetworkError(str(error)) from error
