"""The arrays of an evaluation: read without unpickling, and only what has the form that the page relies on."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pairclip_fast.report.words import shown

ERRORS = (OSError, ValueError, EOFError, KeyError, MemoryError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise on damaged archives (RuntimeError: encrypted or unsupported; SyntaxError: array header)."""
MAX_PICTURE = (1024, 4096)
"""Height and width beyond which a gallery picture is refused."""
Arrays = dict[str, np.ndarray]


def read_arrays(path: Path, *, problems: list[str]) -> Arrays:
    """The usable arrays of an npz file; what is damaged or of another form becomes a problem. Absent file: nothing."""
    if not path.exists():
        return {}
    loaded: Arrays = {}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an npz archive, or cut off")
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                loaded[name] = archive[name]
    except ERRORS as error:
        problems.append(f"evaluations/{path.name} cannot be read whole: {shown(error)}")
    checks = _checks(loaded)
    good: Arrays = {}
    for name, array in loaded.items():
        if name not in checks:
            continue
        if checks[name](array):
            good[name] = array
        else:
            problems.append(f"evaluations/{path.name}: {name} has an unexpected form ({array.dtype}, {array.shape}) and is not shown")
    return good


def _checks(loaded: Arrays) -> dict[str, Callable[[np.ndarray], bool]]:
    """Array name to what must hold; the arrays must also fit each other."""
    ranks = loaded.get("ranks")
    count = len(ranks) if ranks is not None and ranks.ndim == 1 else 0
    per_class = [f"per_class_{side}_{what}" for side in ("left", "right") for what in ("correct", "total")]
    classes = {loaded[name].shape for name in per_class if name in loaded}

    def one_per_pair(array: np.ndarray) -> bool:
        return _whole(array) and array.shape == (count,)

    return {
        "ranks": lambda array: _whole(array) and array.ndim == 1 and bool(np.all(array >= 1)),
        "caption_ids": one_per_pair,
        "sample_ids": one_per_pair,
        "top_ids": lambda array: _whole(array) and array.ndim == 2 and len(array) == count,
        "top_scores": lambda array: array.dtype.kind == "f" and "top_ids" in loaded and array.shape == loaded["top_ids"].shape,
        "gallery_index": lambda array: _whole(array) and array.ndim == 1 and bool(np.all((array >= 0) & (array < count))),
        "gallery_images": _pictures,
        "attention": lambda array: array.dtype.kind == "f" and array.ndim in (3, 4) and array.size > 0,
        **{name: lambda array: _whole(array) and array.ndim == 1 and len(classes) == 1 for name in per_class},
    }


def _whole(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu"


def _pictures(array: np.ndarray) -> bool:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        return False
    height, width = array.shape[1:3]
    return bool(0 < height <= MAX_PICTURE[0] and 0 < width <= MAX_PICTURE[1])
