"""A disk that dies at the n-th operation, on a real folder, and what a power cut may leave of what was done before.

A power cut undoes writes whose file was not synced, and renames whose folder was not synced, each of which may or may not
have reached the disk. Nothing is really synced: the ledger is what counts, and the tests are quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from pairclip_fast.storage import FileSystem


class PowerCut(BaseException):
    """Not an `Exception`: nothing may catch it and carry on."""


class DyingDisk(FileSystem):
    """The real file system until operation number `last`, and then never again."""

    def __init__(self, last: int = 1 << 30, *, forget_fsync: bool = False) -> None:
        self.last, self.count, self.forget_fsync = last, 0, forget_fsync
        self.unsafe_renames: list[Path] = []
        """What had not been synced when it, or a folder around it, got its name."""
        self._content: set[Path] = set()
        self._folders: set[Path] = set()
        self._renames: list[tuple[Path, Path, bytes | None]] = []

    def _step(self) -> None:
        self.count += 1
        if self.count > self.last:
            raise PowerCut

    def open_for_writing(self, path: Path) -> IO[bytes]:
        self._step()
        self._content.add(path)
        self._folders.add(path.parent)
        return super().open_for_writing(path)

    def write(self, file: IO[bytes], data: bytes | memoryview) -> None:
        self._step()
        self._content.add(Path(file.name))
        super().write(file, data)

    def fsync(self, file: IO[bytes]) -> None:
        self._step()
        file.flush()
        if not self.forget_fsync:
            self._content.discard(Path(file.name))

    def fsync_folder(self, path: Path) -> None:
        self._step()
        self._folders.discard(path)
        self._renames = [row for row in self._renames if row[1].parent != path]

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        self.unsafe_renames += [path for path in sorted(self._content | self._folders) if path.is_relative_to(source)]
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self._renames.append((source, target, before))
        self._content = {target / path.relative_to(source) if path.is_relative_to(source) else path for path in self._content}

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)

    def remove_tree(self, path: Path) -> None:
        self._step()
        super().remove_tree(path)

    def lose_power(self, *, renames_reached_the_disk: bool = False) -> None:
        """Leave the worst state that the syncs so far allow: unsynced files are empty, unsynced renames were not, or were."""
        for path in self._content:
            if path.exists():
                path.write_bytes(b"")
        for source, target, before in () if renames_reached_the_disk else reversed(self._renames):
            if target.exists() and not source.exists():
                target.rename(source)
            if before is not None:
                target.write_bytes(before)
