"""CIFAR-100 in its published forms: the python and the binary version, as archive or unpacked.

Archives are read in memory; nothing is unpacked to disk. The python version is a set of pickles, and a pickle is a
program: see `pickles` for how it is read without running anything.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images" (2009), https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairclip_fast.data.sources.base import ImageSet, check_labels, display_names
from pairclip_fast.data.sources.pickles import RememberedArray, load_pickle
from pairclip_fast.data.tar import Readable, stream_members
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

ARCHIVE_MD5 = {
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
"""As published (torchvision names the same)."""
SIDE = 32
IMAGE_BYTES = 3 * SIDE * SIDE
RECORD_BYTES = 2 + IMAGE_BYTES
MAX_ARCHIVE_BYTES = 1 << 30
PYTHON_FILES = ("train", "test", "meta")
BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")


def read_cifar100(path: Path, *, size: int, on_bad: str, events: EventLog) -> tuple[ImageSet, ImageSet]:
    """The train and the test part.

    Args:
        path: cifar-100-python(.tar.gz) or cifar-100-binary(.tar.gz), file or folder.
        size: Side of a tile.
        on_bad: Not used: raw pixels cannot be bad one by one.
        events: For notes.

    Raises:
        DataError: not such an archive, damaged, or with labels out of range.
    """
    del on_bad
    files = _files_of(path, events=events)
    if "meta" in files:
        names = [_text(name, where=path) for name in _field(files["meta"], "fine_label_names", where=path)]
        parts = [_python_part(files[part], where=f"{path}: {part}") for part in ("train", "test")]
    else:
        names = _text(files["fine_label_names.txt"], where=path).split()
        parts = [_binary_part(files[f"{part}.bin"], where=f"{path}: {part}.bin") for part in ("train", "test")]
    if size != SIDE:
        events.note(f"all images are resized from {SIDE} x {SIDE} to {size} x {size}")
    sets = [
        check_labels(
            ImageSet(images=_resized(images, size), labels=labels, class_names=display_names(names, where=path), source="cifar100"),
            where=f"{path}: {part}",
            every_class=part == "train",
        )
        for part, (images, labels) in zip(("train", "test"), parts, strict=True)
    ]
    return sets[0], sets[1]


def _resized(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    if size == SIDE:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images])


def _files_of(path: Path, *, events: EventLog) -> dict[str, bytes]:
    """Contents of the three files of either version."""
    try:
        if path.is_dir():
            wanted = PYTHON_FILES if (path / "meta").is_file() else BINARY_FILES
            for name in wanted:
                if not (path / name).is_file() or (path / name).stat().st_size > MAX_ARCHIVE_BYTES:
                    raise DataError("the CIFAR-100 folder is incomplete", where=path, expected=", ".join(wanted), got=f"no usable {name}")
            return {name: (path / name).read_bytes() for name in wanted}
        _check_md5(path, events=events)
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Readable = gzip.GzipFile(fileobj=file) if compressed else file
            found = stream_members(stream, {*PYTHON_FILES, *BINARY_FILES}, where=path, max_total=MAX_ARCHIVE_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("cannot read the CIFAR-100 archive", where=path, got=error) from error
    for wanted in (PYTHON_FILES, BINARY_FILES):
        if all(name in found for name in wanted):
            return {name: found[name] for name in wanted}
    expected = f"{', '.join(PYTHON_FILES)} (python version) or {', '.join(BINARY_FILES)} (binary version)"
    raise DataError("this is no CIFAR-100 archive", where=path, expected=expected, got=", ".join(sorted(found)) or "none of them")


def _check_md5(path: Path, *, events: EventLog) -> None:
    """Say so if a file carries a published name but not the published content (it may be a subset made on purpose)."""
    expected = ARCHIVE_MD5.get(path.name)
    if expected is None:
        return
    digest = md5_file(path)
    if digest != expected:
        events.note(f"{path.name} is not the published archive (MD5 {digest}, published {expected})")


def md5_file(path: Path) -> str:
    """Hex MD5: what the publisher gives. It guards against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _binary_part(data: bytes, *, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Records of coarse label, fine label and 3,072 bytes, colour planes first."""
    if len(data) % RECORD_BYTES:
        raise DataError(
            "the file is not a whole number of records", where=where, expected=f"n x {RECORD_BYTES:,} bytes", got=f"{len(data):,}"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD_BYTES)
    return _channels_last(records[:, 2:]), records[:, 1].astype(np.int64)


def _python_part(data: bytes, *, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    fields = load_pickle(data, where=where)
    pixels, labels = _value(fields, "data", where=where), _value(fields, "fine_labels", where=where)
    if not isinstance(pixels, RememberedArray):
        raise DataError("the batch's `data` is no array", where=where, got=type(pixels).__name__)
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise DataError("the batch's `fine_labels` is no list of integers", where=where)
    rows = pixels.rows(IMAGE_BYTES, where=where)
    if len(rows) != len(labels):
        raise DataError("images and labels differ in number", where=where, expected=f"{len(rows):,} labels", got=f"{len(labels):,}")
    return _channels_last(rows), np.array(labels, dtype=np.int64)


def _channels_last(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _field(data: bytes, name: str, *, where: object) -> list[Any]:
    value = _value(load_pickle(data, where=where), name, where=where)
    if not isinstance(value, list) or not all(isinstance(item, bytes | str) for item in value):
        raise DataError(f"`{name}` is no list of names", where=where)
    return value


def _text(name: bytes | str, *, where: object) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else name
    except UnicodeDecodeError as error:
        raise DataError("a class name is not UTF-8", where=where, got=error) from error


def _value(fields: Any, name: str, *, where: object) -> Any:
    """A field of a batch; its key is text or, from Python 2, bytes."""
    if isinstance(fields, dict):
        for key in (name, name.encode()):
            if key in fields:
                return fields[key]
    raise DataError(f"the batch has no `{name}`", where=where)
