"""Which source to open when the user did not say: a given path, CIFAR-100 in the usual places, its download, shapes."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

from pairclip_fast.data.places import ARCHIVES, USUAL_FOLDER
from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.events import EventLog

ENVIRONMENT_VARIABLE = "PAIRCLIP_CIFAR100"
TAR_ENDINGS = (".tar.gz", ".tgz", ".tar")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """A kind of source and where it is."""

    kind: str
    path: Path | None = None
    test_path: Path | None = None
    reason: str
    fallback: bool = False
    """Shapes may stand in if the download fails."""

    @property
    def needs_download(self) -> bool:
        """CIFAR-100 is meant, and is not on this machine."""
        return self.kind == "cifar100" and self.path is None


def locate(kind: str, *, path: Path | None, test_path: Path | None, events: EventLog) -> Location:
    """Decide what to open, and say so in one line. Looks at names only; opens and downloads nothing.

    Raises:
        ConfigError: a path is missing, does not exist, or does not go with the kind.
        DataError: nothing at the path is a known kind of source.
    """
    location = _locate(kind, path=path, test_path=test_path)
    what = "CIFAR-100, to be downloaded" if location.needs_download else f"{location.kind} {location.path or ''}".strip()
    events.note(f"images: {what} ({location.reason})", source=location.kind, reason=location.reason)
    return location


def _locate(kind: str, *, path: Path | None, test_path: Path | None) -> Location:
    for name, given in (("--path", path), ("--test-path", test_path)):
        if given is not None and not given.exists():
            raise ConfigError("the source does not exist", where=name, got=given)
    if path is not None:
        return _given(kind, path, test_path)
    if kind == "shapes":
        return Location(kind="shapes", reason="as asked")
    if kind in ("auto", "cifar100"):
        found = _usual_place(any_kind=kind == "auto")
        if found is not None:
            return found
        return Location(kind="cifar100", reason="no --path, and none of the usual places has it", fallback=kind == "auto")
    raise ConfigError(f"--source {kind} needs --path", where="--path", expected="a file or folder")


def _given(kind: str, path: Path, test_path: Path | None) -> Location:
    if kind == "shapes":
        raise ConfigError("generated shapes have no --path", where="--path", got=path)
    seen, seen_path = guess_kind(path)
    if kind not in ("auto", seen):
        raise ConfigError(f"--path does not look like --source {kind}", where=path, got=seen, fix=f"use --source {seen} or auto")
    if seen == "cifar100" and test_path is not None:
        raise ConfigError("the CIFAR-100 archive has its own test part", where="--test-path", fix="leave it out")
    if test_path is not None:
        test_kind, test_path = guess_kind(test_path)
        if test_kind != seen:
            raise ConfigError("--test-path is of another kind than --path", where=test_path, expected=seen, got=test_kind)
        if test_path.resolve() == seen_path.resolve():
            raise ConfigError("the test images would be the training images", where="--test-path", got=test_path)
    return Location(kind=seen, path=seen_path, test_path=test_path, reason="given by --path")


def guess_kind(path: Path) -> tuple[str, Path]:
    """The kind of source at `path`, and the path to open (the archive or the parquet files' folder, if `path` is the folder around it).

    Raises:
        DataError: nothing there is known, or it is unclear which of several folders is meant.
    """
    if path.is_file():
        if path.name.endswith(".parquet"):
            return "parquet", path
        if path.name.endswith(TAR_ENDINGS):
            return "cifar100", path
    elif path.is_dir():
        if _is_unpacked(path):
            return "cifar100", path
        inside = _archive_in(path)
        if inside is not None:
            return "cifar100", inside
        if any(path.glob("*.parquet")):
            return "parquet", path
        below = _parquet_below(path)
        if below is not None:
            return "parquet", below
        if any(entry.is_dir() for entry in path.iterdir()):
            return "imagefolder", path
    raise DataError(
        "no images of a known kind",
        where=path,
        expected="a CIFAR-100 archive (python or binary version) or its folder, parquet files, or a folder with one folder per class",
        got="an empty folder" if path.is_dir() and not any(path.iterdir()) else None,
    )


def _parquet_below(path: Path) -> Path | None:
    """The one folder in `path` that holds parquet files, as in a clone of a data set of the Hugging Face hub."""
    folders = sorted({file.parent for file in path.glob("*/*.parquet") if not file.parent.name.startswith(".")})
    if len(folders) > 1:
        got = ", ".join(folder.name for folder in folders)
        raise DataError("several folders hold parquet files", where=path, got=got, fix="name one with --path, another with --test-path")
    return folders[0] if folders else None


def _is_unpacked(path: Path) -> bool:
    return (path / "train.bin").is_file() or all((path / name).is_file() for name in ("train", "test", "meta"))


def _archive_in(folder: Path) -> Path | None:
    for name in ARCHIVES:
        entry = folder / name
        if entry.is_file() or (entry.is_dir() and _is_unpacked(entry)):
            return entry
    return None


def _usual_place(*, any_kind: bool) -> Location | None:
    variable = os.environ.get(ENVIRONMENT_VARIABLE)
    if variable and any_kind:
        folder = Path(variable)
        if not folder.is_dir():
            raise ConfigError("this variable names no folder", where=ENVIRONMENT_VARIABLE, got=variable)
        kind, path = guess_kind(folder)
        return Location(kind=kind, path=path, reason=f"named by {ENVIRONMENT_VARIABLE}")
    for folder in (Path(), USUAL_FOLDER, Path("datasets"), cache_folder(), cache_folder().parent, cache_folder().parent / "torch"):
        found = _archive_in(folder)
        if found is not None:
            return Location(kind="cifar100", path=found, reason="found in a usual place")
    return None


def cache_folder() -> Path:
    """Where a downloaded archive is kept: ~/.cache/pairclip-fast, or beside other temporary files where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (Path.expanduser raises without a home)
    return (Path(tempfile.gettempdir()) if base.startswith("~") else Path(base)) / "pairclip-fast"
