"""`shard` and `verify`: what the command line calls. A folder is built aside and gets its name only when it is whole."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairclip_fast.data.build import build_folder, check_space, refuse_foreign_folder, refuse_mount_point, same_folder
from pairclip_fast.data.folder_plan import FolderPlan, plan_folder, stand_in_note
from pairclip_fast.data.manifest import CAPTIONS_NAME, REBUILD, read_manifest, to_json
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.places import MANIFEST_NAME, USUAL_FOLDER, default_folder
from pairclip_fast.data.records import record_index_size
from pairclip_fast.data.sources import locate, open_source
from pairclip_fast.data.verify import Finding, verify_folder
from pairclip_fast.data.writer import ShardFormat, bytes_needed
from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL, FileSystem


def run_shard(options: ShardOptions, events: EventLog, *, fs: FileSystem = REAL) -> dict[str, Any]:
    """Make a data folder, or find that it is there already.

    Args:
        options: What to make.
        events: For progress, notes and fallbacks.
        fs: Where durability comes from.

    Returns:
        A JSON-able summary: action (written, unchanged or planned), out, source, splits, bytes, digest, seconds.

    Raises:
        ConfigError: the folder exists and is something else, and --overwrite was not given (or it is no data folder).
        DataError: the source images are missing, damaged or cannot be split.
        RunBusyError: another process is writing the folder.
        StorageError: no space, or the disk failed; nothing is left under the final name.
    """
    started = time.monotonic()
    location = locate(options.source, path=options.path, test_path=options.test_path, events=events)
    if options.out == default_folder() != USUAL_FOLDER:
        events.note(f"CIFAR-100 itself lies in {USUAL_FOLDER}, so commands that are not given a data folder take {options.out}")
    refuse_mount_point(options)
    refuse_foreign_folder(options.out)
    if options.dry_run and location.needs_download:
        events.say(f"plan: {location.reason}; the rest depends on it")
        return {"action": "planned", "out": str(options.out), "source": location.reason, "splits": {}, "bytes": None}
    sources = open_source(
        location.kind,
        path=location.path,
        test_path=location.test_path,
        seed=options.seed,
        on_bad=options.on_bad,
        events=events,
        fallback=location.fallback,
    )
    plan = plan_folder(sources, options)
    shard_format = ShardFormat(encoding=options.encoding, shard_size=options.shard_size)
    needed = sum(bytes_needed(split.samples, shard_format) for split in plan.splits.values())
    summary = _summary(plan, options, needed)
    _say_plan(summary, plan, events)
    manifest, action = same_folder(options, plan), "unchanged"
    if options.dry_run:
        return {**summary, "action": "planned", "exists": manifest is not None}
    if manifest is None:
        check_space(options.out, needed)
        manifest, action = build_folder(options, plan, shard_format, events=events, fs=fs)
    seconds = time.monotonic() - started
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    size = sum(shard.bytes + shard.index_bytes + record_index_size(shard.count) for shard in shards)
    return {**summary, "action": action, "bytes": size, "digest": manifest.digest, "seconds": round(seconds, 3)}


def run_verify(folder: Path, events: EventLog, *, load_bank: Callable[[Path], object] | None = None) -> dict[str, Any]:
    """Check every byte of a data folder.

    Args:
        folder: The data folder.
        events: Told of each finding, shown the progress.
        load_bank: Reads a caption bank and raises a `DataError` if it is damaged; None leaves the folder's own unread.

    Returns:
        A JSON-able summary: folder, ok, findings, splits, digest; for a folder without a manifest that can be read the last two are None.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError("there is no data folder", where=folder, fix="name one with --data")
    findings, bank = verify_folder(folder, events=events), folder / CAPTIONS_NAME
    if load_bank is not None and bank.exists():
        try:
            load_bank(bank)
        except DataError as error:
            findings.append(Finding(CAPTIONS_NAME, error.what, str(error.expected or ""), str(error.got or "")))
    for finding in findings:
        events.note(str(finding), finding=dataclasses.asdict(finding))
    summary: dict[str, Any] = {"folder": str(folder), "ok": not findings, "findings": [dataclasses.asdict(finding) for finding in findings]}
    if any(finding.where == MANIFEST_NAME for finding in findings):
        return summary | {"splits": None, "digest": None}
    manifest = read_manifest(folder)
    return summary | {"splits": {split: entry.count for split, entry in manifest.splits.items()}, "digest": manifest.digest}


def refuse_damage(summary: dict[str, Any]) -> None:
    """Raise unless `run_verify` found nothing.

    Raises:
        DataError: there are findings.
    """
    count = len(summary["findings"])
    if count:
        what = f"the data folder is damaged: {count} finding{'s' if count > 1 else ''}"
        raise DataError(what, where=summary["folder"], fix=f"{REBUILD} (foreign files are yours to move)")


def render_shard(summary: dict[str, Any]) -> str:
    """The summary of `run_shard` in one line."""
    action, out = summary["action"], summary["out"]
    if action == "planned":
        return f"planned only: {out} was not touched"
    pairs = ", ".join(f"{split['pairs']:,} {name}" for name, split in summary["splits"].items())
    if action == "unchanged":
        return f"{out} already holds exactly this ({pairs} pairs): nothing to do"
    return f"wrote {out}: {pairs} pairs, {summary['bytes'] / 1e6:,.0f} MB in {summary['seconds']:.1f} s"


def render_verify(summary: dict[str, Any]) -> str:
    """The summary of `run_verify` in one line."""
    if not summary["ok"]:
        return f"{summary['folder']} is damaged"
    return f"{summary['folder']} is whole: " + ", ".join(f"{count:,} {split}" for split, count in summary["splits"].items()) + " pairs"


def _summary(plan: FolderPlan, options: ShardOptions, needed: int) -> dict[str, Any]:
    splits = {name: {"pairs": len(split.samples), "images": split.images} for name, split in plan.splits.items()}
    return {
        "out": str(options.out),
        "source": plan.sources.description,
        "fallback_reason": plan.sources.fallback_reason,
        "classes": len(plan.sources.train.class_names),
        "captions": len(plan.sources.train.class_names) ** 2,
        "encoding": options.encoding,
        "splits": splits,
        "skipped": len(plan.sources.train.skipped) + len(plan.sources.test.skipped if plan.sources.test else ()),
        "split_proof": to_json(plan.proof),
        "notes": list(plan.notes),
        "bytes": needed,
    }


def _say_plan(summary: dict[str, Any], plan: FolderPlan, events: EventLog) -> None:
    events.say(f"source: {summary['source']}; {summary['classes']} classes, {summary['captions']:,} captions")
    for name, split in summary["splits"].items():
        events.say(f"{name}: {split['pairs']:,} pairs of {split['images']:,} images")
    events.say(f"to {summary['out']} as {summary['encoding']}, about {summary['bytes'] / 1e6:,.0f} MB")
    for note in plan.notes:
        if note != stand_in_note(plan.sources):  # which was said as a fallback
            events.note(note)
