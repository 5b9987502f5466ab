"""Images in folders, one folder per class, read in sorted order so that the order does not depend on the file system.

Folders called `train` and `test` around the class folders are the two parts. What is hidden (its name begins with a dot) is passed
over, links to folders are followed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pairclip_fast.data.sources.base import ImageSet, check_labels, display_names, printable_name
from pairclip_fast.data.sources.decode import BadImageError, ImageCollector
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

MAX_FILE_BYTES = 64 << 20


def folder_parts(path: Path) -> tuple[Path, Path | None]:
    """The folders that hold the class folders of the train and the test part.

    Raises:
        DataError: beside `train` there is a folder that is not a test part, so that it is unclear what to do with it.
    """
    train, test = path / "train", path / "test"
    if not _subfolders(train):
        return path, None
    parts = [train, test] if _subfolders(test) else [train]
    others = [entry.name for entry in _subfolders(path) if entry not in parts]
    if others:
        expected = "only train and test, each with one folder per class"
        fix = f"name the parts to use: --path {train}, and --test-path for another one"
        raise DataError("the folder mixes train with others", where=path, expected=expected, got=", ".join(others), fix=fix)
    return train, test if test in parts else None


def read_imagefolder(folder: Path, *, on_bad: str, size: int, events: EventLog) -> ImageSet:
    """Decode all images of one part. Every file that is not hidden must be an image.

    Args:
        folder: Holds one folder per class; images may lie in folders below it.
        on_bad: `raise` or `skip`.
        size: Side of a tile.
        events: For progress and notes.

    Raises:
        DataError: no classes, a class without images, a folder that cannot be read, or images bad beyond the policy.
    """
    classes = _subfolders(folder)
    if not classes:
        raise DataError("the source is empty", where=folder, expected="one folder per class", got="no folders")
    names = display_names([printable_name(entry.name) for entry in classes], where=folder)
    files = [(label, file) for label, entry in enumerate(classes) for file in sorted(_files(entry, around=()))]
    collector = ImageCollector(where=folder, on_bad=on_bad, size=size, events=events)
    labels, ids = [], []
    with events.progress("reading images", len(files), unit="images") as advance:
        for label, file in files:
            name = printable_name(file.relative_to(folder).as_posix())
            if collector.add(_bytes_of(file), name=name):
                labels.append(label)
                ids.append(name)
            advance(1)
    result = ImageSet(
        images=collector.finish(),
        labels=np.array(labels, dtype=np.int64),
        class_names=names,
        source="imagefolder",
        ids=tuple(ids),
        skipped=tuple(collector.skipped),
    )
    return check_labels(result, where=folder, every_class=True)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, *, around: tuple[Path, ...]) -> Iterator[Path]:
    """What is no folder, at any depth. `around`: the folders on the way, so that a link back to one of them is found out."""
    real = folder.resolve()
    if real in around:
        raise DataError("a link leads back to a folder around it", where=folder, got=real, fix="remove it")
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError("the folder cannot be read", where=folder, got=error.strerror) from error
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry, around=(*around, real))
        else:
            yield entry


def _bytes_of(file: Path) -> bytes | BadImageError:
    """The file's bytes, or why there are none."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return BadImageError("not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            return BadImageError(f"{status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        return file.read_bytes()
    except OSError as error:
        return BadImageError(f"cannot be read: {error.strerror}")
