"""Puts a planned data folder on disk: built aside, renamed when whole, so that a reader meets the old one or the new one."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

from pairclip_fast.data.folder_plan import FolderPlan
from pairclip_fast.data.manifest import CAPTIONS_NAME, CAPTIONS_TEMPORARY, MANIFEST_NAME, SPLITS, Manifest, write_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.writer import ShardFormat, write_split
from pairclip_fast.errors import ConfigError, StorageError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import FileSystem, commit_folder, storage_errors

SPACE_RESERVE_BYTES = 64 << 20
"""Left free on the disk."""
SHARD_FILE = re.compile(r"[0-9]{6}\.(tar|idx|records)")


def refuse_foreign_folder(out: Path) -> None:
    """Never replace what we did not make: a folder counts as ours if it has a manifest and nothing but our names in it.

    Raises:
        ConfigError: it is something else; the message names the first foreign entry.
    """
    if not out.exists():
        return
    foreign = _foreign_entry(out)
    if foreign is not None:
        fix = "choose another --out, or move the foreign files elsewhere"
        expected = "a free name, or a folder made by `shard`"
        raise ConfigError("this exists and is not just a data folder", where=out, expected=expected, got=foreign, fix=fix)


def _foreign_entry(out: Path) -> str | None:
    """The first thing in `out` that is not ours; None if there is none."""
    if not out.is_dir():
        return "not a folder"
    for entry in sorted(out.iterdir()):
        if entry.name in SPLITS and entry.is_dir():
            for file in sorted(entry.iterdir()):
                if not SHARD_FILE.fullmatch(file.name):
                    return f"{entry.name}/{file.name}"
        elif entry.name not in (MANIFEST_NAME, CAPTIONS_NAME) and not entry.name.startswith(CAPTIONS_TEMPORARY):
            return entry.name
    return f"no {MANIFEST_NAME}" if any(out.iterdir()) and not (out / MANIFEST_NAME).is_file() else None


def check_space(out: Path, needed: int) -> None:
    """Raise before writing rather than in the middle of it.

    Raises:
        StorageError: there is not room for `needed` bytes and a reserve.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + SPACE_RESERVE_BYTES:
        raise StorageError(
            "not enough space",
            where=parent,
            expected=f"{needed + SPACE_RESERVE_BYTES:,} bytes free",
            got=f"{free:,}",
            fix="free some, choose another --out, fewer --num-pairs or --encoding png",
        )


def build_folder(options: ShardOptions, plan: FolderPlan, shard_format: ShardFormat, *, events: EventLog, fs: FileSystem) -> Manifest:
    """Write everything aside, then rename. What a killed run left behind is cleared first.

    Args:
        options: What to make, and where.
        plan: Its content.
        shard_format: Its encoding.
        events: For progress.
        fs: Where durability comes from.

    Raises:
        StorageError: the disk is full or failed; the old folder, if any, is still there.
    """
    out = options.out.resolve()
    temporary = out.with_name(f".{out.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    trash = out.with_name(f".{out.name}.trash-{socket.gethostname()}-{os.getpid()}")
    with storage_errors(out):
        fs.mkdir(out.parent)
        _clear_leftovers(out, fs=fs)
        try:
            fs.mkdir(temporary)
            shards = {}
            total = sum(len(split.samples) for split in plan.splits.values())
            with events.progress("sharding", total, unit="pairs") as advance:
                for name, split in plan.splits.items():
                    shards[name] = write_split(temporary / name, split.samples, shard_format, fs=fs, advance=advance)
            manifest = plan.manifest(options, shards)
            write_manifest(temporary, manifest, fs=fs)
            if out.exists():
                refuse_foreign_folder(out)
                fs.rename(out, trash)
            commit_folder(temporary, out, fs=fs)
        except (OSError, StorageError, KeyboardInterrupt, SystemExit):
            fs.remove_tree(temporary)
            if trash.exists() and not out.exists():
                fs.rename(trash, out)
            raise
        fs.remove_tree(trash)
    return manifest


def _clear_leftovers(out: Path, *, fs: FileSystem) -> None:
    """Remove what processes of this host that are gone left half made; give back what they had moved away."""
    host = socket.gethostname()
    for kind in ("trash", "tmp"):
        prefix = f".{out.name}.{kind}-{host}-"
        for leftover in sorted(entry for entry in out.parent.iterdir() if entry.name.startswith(prefix)):
            pid = leftover.name.removeprefix(prefix)
            if not pid.isdigit() or _alive(int(pid)):
                continue
            if kind == "trash" and not out.exists():
                fs.rename(leftover, out)
            else:
                fs.remove_tree(leftover)


def _alive(pid: int) -> bool:
    """Whether another process has this id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
