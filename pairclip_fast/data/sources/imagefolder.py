"""Images in folders, one folder per class, read in sorted order so that the order does not depend on the file system.

Folders called `train` and `test` around the class folders are the two parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pairclip_fast.data.sources.base import ImageSet, check_labels, display_names, printable_name
from pairclip_fast.data.sources.decode import ImageCollector
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

MAX_FILE_BYTES = 64 << 20


def folder_parts(path: Path) -> tuple[Path, Path | None]:
    """The folders that hold the class folders of the train and the test part."""
    if _subfolders(path / "train"):
        return path / "train", path / "test" if _subfolders(path / "test") else None
    return path, None


def read_imagefolder(folder: Path, *, on_bad: str, size: int, events: EventLog) -> ImageSet:
    """Decode all images of one part. Hidden files are passed over; every other file must be an image.

    Args:
        folder: Holds one folder per class; images may lie in folders below it.
        on_bad: `raise` or `skip`.
        size: Side of a tile.
        events: For progress and notes.

    Raises:
        DataError: no classes, a class without images, or images bad beyond the policy.
    """
    classes = _subfolders(folder)
    if not classes:
        raise DataError("the source is empty", where=folder, expected="one folder per class", got="no folders")
    names = display_names([printable_name(entry.name) for entry in classes], where=folder)
    files = [(label, file) for label, entry in enumerate(classes) for file in _files(entry)]
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


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if not file.is_dir() and not file.name.startswith("."))


def _bytes_of(file: Path) -> bytes | None:
    """The file's bytes; None for what is no plain file, cannot be read or is far too large."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            return None
        return file.read_bytes()
    except OSError:
        return None
