"""Puts a planned data folder on disk: built aside, under a lock, and renamed when whole, so that nobody meets half a folder.

A new folder takes one rename. A replacement takes two, and between them there is no folder: a reader finds none at that moment, and
after a kill right there the next run first gives the old one back.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pairclip_fast.data.folder_plan import FolderPlan
from pairclip_fast.data.index import check_shard_size
from pairclip_fast.data.manifest import CAPTIONS_NAME, CAPTIONS_TEMPORARY, SPLITS, Manifest, read_manifest, write_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.places import MANIFEST_NAME
from pairclip_fast.data.writer import ShardFormat, write_split
from pairclip_fast.errors import ConfigError, DataError, StorageError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import FileSystem, commit_folder, locked_beside, storage_errors

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


def refuse_mount_point(options: ShardOptions) -> None:
    """Say before the work that the folder cannot get its name by renaming; one that holds data already may turn out to be unchanged.

    Raises:
        ConfigError: something is mounted there.
    """
    out = options.out.resolve()
    if out.is_mount() and (options.overwrite or not (out / MANIFEST_NAME).exists()):
        fix = f"give a folder inside it, as --out {options.out / 'pairs'}"
        raise ConfigError("a mount point cannot be replaced by a folder", where=options.out, fix=fix)


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


def same_folder(options: ShardOptions, plan: FolderPlan) -> Manifest | None:
    """The manifest of the folder if it is there, whole and of the same arguments; None if it is to be made.

    Raises:
        ConfigError: it holds other data, and --overwrite was not given.
        DataError: it is damaged.
    """
    out = options.out
    if options.overwrite or not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    if manifest.arguments != plan.arguments:
        names = sorted(key for key in manifest.arguments | plan.arguments if manifest.arguments.get(key) != plan.arguments.get(key))
        raise ConfigError(
            "the folder holds data made from other arguments",
            where=out,
            expected=", ".join(f"{name} = {manifest.arguments.get(name)!r}" for name in names),
            got=", ".join(f"{name} = {plan.arguments.get(name)!r}" for name in names),
            fix="choose another --out, or replace it with --overwrite",
        )
    for split, entry in manifest.splits.items():
        for shard in entry.shards:
            check_shard_size(out / split / shard.name, shard)
            for name in (shard.index_name, shard.records_name):
                if not (out / split / name).exists():
                    raise DataError("an index is missing", where=out / split / name, fix="write the folder again with --overwrite")
    return manifest


def check_space(out: Path, needed: int) -> None:
    """Raise before writing rather than in the middle of it.

    Raises:
        StorageError: there is not room for `needed` bytes and a reserve.
    """
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + SPACE_RESERVE_BYTES:
        raise StorageError(
            "not enough space",
            where=parent,
            expected=f"{needed + SPACE_RESERVE_BYTES:,} bytes free",
            got=f"{free:,}",
            fix="free some, choose another --out, fewer --num-pairs or --encoding png",
        )


def build_folder(
    options: ShardOptions, plan: FolderPlan, shard_format: ShardFormat, *, events: EventLog, fs: FileSystem
) -> tuple[Manifest, str]:
    """Write everything aside, then rename. What a killed run left behind is cleared first.

    Args:
        options: What to make, and where.
        plan: Its content.
        shard_format: Its encoding.
        events: For progress.
        fs: Where durability comes from.

    Returns:
        The manifest, and `written`, or `unchanged` if another run made the same folder in the meantime.

    Raises:
        ConfigError: another run made another folder in the meantime, and --overwrite was not given.
        RunBusyError: another process is writing the folder.
        StorageError: the disk is full or failed; the old folder, if any, is still there.
    """
    out = options.out.resolve()
    with storage_errors(out):
        fs.mkdir(out.parent)
        with locked_beside(out):
            _clear_leftovers(out, fs=fs)
            manifest = same_folder(options, plan)
            if manifest is not None:
                return manifest, "unchanged"
            return _write(out, options, plan, shard_format, events=events, fs=fs), "written"


def _write(out: Path, options: ShardOptions, plan: FolderPlan, shard_format: ShardFormat, *, events: EventLog, fs: FileSystem) -> Manifest:
    """Put the folder in place of whatever data folder is there."""
    temporary, trash = _names_aside(out)
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
    except BaseException:
        fs.remove_tree(temporary)
        if trash.exists() and not out.exists():
            fs.rename(trash, out)
        raise
    fs.remove_tree(trash)
    return manifest


def _names_aside(out: Path) -> tuple[Path, Path]:
    """Where the new folder is built, and where the old one waits to be removed. The lock is what keeps two runs apart."""
    return out.with_name(f".{out.name}.tmp-shard"), out.with_name(f".{out.name}.trash-shard")


def _clear_leftovers(out: Path, *, fs: FileSystem) -> None:
    """Remove what a killed run left half made; give back what it had moved away."""
    temporary, trash = _names_aside(out)
    if trash.exists() and not out.exists():
        fs.rename(trash, out)
    for leftover in (temporary, trash):
        fs.remove_tree(leftover)
