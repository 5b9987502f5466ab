"""What every source returns: decoded images of one size with labels, and where each came from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pairclip_fast.errors import DataError

TILE_SIZE = 32
MAX_CLASS_NAME = 200
SMALLEST_VARIANCE = 1e-6
"""So that images of one colour can be normalised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one part of a source, in memory."""

    images: npt.NDArray[np.uint8]
    """uint8 [n, height, width, 3]."""
    labels: npt.NDArray[np.int64]
    """int64 [n], index into `class_names`."""
    class_names: tuple[str, ...]
    """Display names, "_" replaced by " "."""
    source: str
    """Kind of source: cifar100, parquet, imagefolder or shapes."""
    ids: tuple[str, ...] | None = None
    """Where each image came from (a file name); None: its number."""
    skipped: tuple[dict[str, str], ...] = ()
    """Bad images that were left out: where and why."""

    def id(self, index: int) -> str:
        """Name of one image, unique in this set."""
        return str(index) if self.ids is None else self.ids[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything a data folder is made of."""

    train: ImageSet
    test: ImageSet | None
    description: str
    """What was taken, in words, without machine paths."""
    fallback_reason: str | None = None
    """Why generated images stand in for CIFAR-100, if they do."""


def printable_name(name: str) -> str:
    """A file name as Unicode text: bytes that are none become \\xNN, so that they can be written down."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def display_names(names: list[str], *, where: object) -> tuple[str, ...]:
    """Class names as they stand in captions.

    Raises:
        DataError: fewer than two classes, or names that are empty, over-long, unprintable or alike.
    """
    shown = tuple(name.replace("_", " ").strip() for name in names)
    bad = [name for name in shown if not name or len(name) > MAX_CLASS_NAME or not name.isprintable()]
    if bad:
        raise DataError("a class name is unusable", where=where, expected=f"1 to {MAX_CLASS_NAME} printable characters", got=repr(bad[0]))
    if len(shown) < 2:
        raise DataError("too few classes", where=where, expected="two or more", got=len(shown))
    if len(set(shown)) < len(shown):
        double = next(name for name in shown if shown.count(name) > 1)
        raise DataError("two classes have the same name", where=where, got=double)
    return shown


def check_labels(images: ImageSet, *, where: object, every_class: bool) -> ImageSet:
    """`images`, if its labels are good.

    Raises:
        DataError: no images, labels out of range, or (if `every_class`) a class without images; with the counts.
    """
    count = len(images.class_names)
    if len(images.labels) == 0:
        raise DataError("the source is empty", where=where, expected="images", got=0)
    outside = (images.labels < 0) | (images.labels >= count)
    if outside.any():
        first = int(np.argmax(outside))
        raise DataError(
            "labels are out of range",
            where=f"{where}: image {images.id(first)}",
            expected=f"0..{count - 1} ({count} class names)",
            got=f"{int(images.labels[first])}; {int(outside.sum()):,} of {len(outside):,} images",
        )
    per_class = np.bincount(images.labels, minlength=count)
    missing = np.flatnonzero(per_class == 0)
    if every_class and len(missing):
        names = ", ".join(images.class_names[i] for i in missing[:10])
        raise DataError(
            "classes without images",
            where=where,
            expected=f"images of all {count} classes",
            got=f"{len(missing)} without: {names}; others have {per_class[per_class > 0].min()} to {per_class.max()}",
        )
    return images


def same_classes(train: tuple[str, ...], test: tuple[str, ...], *, where: object) -> None:
    """Raise unless both parts have the same class names in the same order.

    Raises:
        DataError: naming the first difference.
    """
    for number, (expected, got) in enumerate(zip(train, test, strict=False)):
        if expected != got:
            raise DataError("the test part has other classes", where=f"{where}: class {number}", expected=expected, got=got)
    if len(train) != len(test):
        raise DataError("the test part has another number of classes", where=where, expected=len(train), got=len(test))


def content_digests(images: npt.NDArray[np.uint8]) -> list[bytes]:
    """SHA-256 of the pixels of each image."""
    return [hashlib.sha256(image.tobytes()).digest() for image in images]


def source_digest(parts: dict[str, ImageSet], contents: dict[str, list[bytes]]) -> str:
    """One SHA-256 over all that a source contributes: pixels, labels, ids and class names of each part."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name}\n{len(part.labels)}\n".encode())
        digest.update("\n".join(part.class_names).encode() + b"\n")
        digest.update(b"".join(contents[name]))
        digest.update(part.labels.astype("<i8").tobytes())
        digest.update("\n".join(part.ids or ()).encode())
    return digest.hexdigest()


def channel_statistics(images: npt.NDArray[Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, 0..255, from exact integer sums, so that they are the same everywhere.

    Args:
        images: uint8 [n, height, width, 3].
    """
    means, stds = [], []
    for channel in range(3):
        histogram = np.bincount(images[..., channel].reshape(-1), minlength=256).tolist()
        count = sum(histogram)
        total = sum(value * times for value, times in enumerate(histogram))
        squares = sum(value * value * times for value, times in enumerate(histogram))
        means.append(total / count)
        stds.append(math.sqrt(max((squares * count - total * total) / (count * count), SMALLEST_VARIANCE)))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
