"""Checks every byte of a data folder against its manifest, and what the bytes mean against each other.

All findings are listed at once: a user with a bad disk wants to know what is left. Beyond digests, the samples
themselves are read: names, captions against ids, picture sizes, and the image-level split proof, recomputed from the
source ids and, where the encoding is lossless, from the pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from pairclip_fast.data.folder_plan import contents_digest, ids_digest
from pairclip_fast.data.manifest import CAPTIONS_NAME, CAPTIONS_TEMPORARY, Manifest, ShardEntry, read_manifest
from pairclip_fast.data.pairs import captions
from pairclip_fast.data.places import MANIFEST_NAME
from pairclip_fast.data.records import derive_records, record_index_bytes
from pairclip_fast.data.shards import decode_payload
from pairclip_fast.data.tar import Member, index_text, read_members
from pairclip_fast.errors import DataError, PairclipError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import sha256_file

MAX_FINDINGS_PER_SHARD = 5
PROGRESS_SAMPLES = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    where: str
    problem: str
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        tail = f" (expected {self.expected}, got {self.got})" if self.expected or self.got else ""
        return f"{self.where}: {self.problem}{tail}"


class PairFacts(msgspec.Struct):
    """The JSON member of a pair."""

    left: int
    right: int
    caption_id: int
    left_source: str
    right_source: str


@dataclasses.dataclass(slots=True)
class _Images:
    """Images met in one split: source id -> content digest (empty where the encoding is lossy)."""

    contents: dict[str, bytes] = dataclasses.field(default_factory=dict)


def verify_folder(folder: Path, *, events: EventLog) -> list[Finding]:
    """All findings of a data folder; none if it is whole.

    Args:
        folder: The data folder.
        events: For progress.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [Finding(MANIFEST_NAME, error.what, str(error.expected or ""), str(error.got or ""))]
    findings = _foreign_files(folder, manifest)
    bank = captions(manifest.class_names, manifest.template)
    images = {split: _Images() for split in manifest.splits}
    with events.progress("verifying", sum(split.count for split in manifest.splits.values()), unit="pairs") as advance:
        for split, entry in manifest.splits.items():
            first_id, damaged = 0, False
            for shard in entry.shards:
                found = _check_files(folder, split, shard)
                if not found:
                    check = _ShardCheck(manifest, shard, f"{split}/{shard.name}", bank, images[split])
                    found = check.run(folder / split / shard.name, first_id, advance)
                damaged |= bool(found)
                findings += found
                first_id += shard.count
            if not damaged:
                findings += _check_split(split, manifest, images[split])
    return findings + _check_disjoint(images)


def _foreign_files(folder: Path, manifest: Manifest) -> list[Finding]:
    """Whatever the manifest does not know of."""
    known = {MANIFEST_NAME, CAPTIONS_NAME, *manifest.splits}
    for split, entry in manifest.splits.items():
        known |= {f"{split}/{name}" for shard in entry.shards for name in (shard.name, shard.index_name, shard.records_name)}
    findings = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not name.startswith(CAPTIONS_TEMPORARY):
            findings.append(Finding(name, "a foreign file: the manifest does not know it"))
    return findings


def _check_files(folder: Path, split: str, shard: ShardEntry) -> list[Finding]:
    """Presence, kind, size and digest of a shard and its index."""
    findings = []
    for name, size, digest in ((shard.name, shard.bytes, shard.sha256), (shard.index_name, shard.index_bytes, shard.index_sha256)):
        path, where = folder / split / name, f"{split}/{name}"
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                findings.append(Finding(where, "not a plain file"))
            elif status.st_size != size:
                problem = "truncated" if status.st_size < size else "longer than it was"
                findings.append(Finding(where, problem, f"{size:,} bytes", f"{status.st_size:,}"))
            elif (got := sha256_file(path)) != digest:
                findings.append(Finding(where, "changed", f"SHA-256 {digest}", got))
        except FileNotFoundError:
            findings.append(Finding(where, "missing", f"{size:,} bytes"))
        except OSError as error:
            findings.append(Finding(where, f"cannot be read: {error.strerror or error}"))
    return findings


class _ShardCheck:
    """The samples of one shard whose files are the manifest's."""

    def __init__(self, manifest: Manifest, shard: ShardEntry, where: str, bank: list[str], images: _Images) -> None:
        self.manifest, self.shard, self.where, self.bank, self.images = manifest, shard, where, bank, images
        self.decoder = msgspec.json.Decoder(PairFacts)
        self.findings: list[Finding] = []

    def run(self, path: Path, first_id: int, advance: Callable[[int], None]) -> list[Finding]:
        """Findings of this shard, the first few of its samples."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as buffer:
            try:
                members = list(read_members(buffer, where=self.where, max_members=3 * self.shard.count))
            except DataError as error:
                return [Finding(self.where, error.what, str(error.expected or ""), str(error.got or ""))]
            self._check_names(members, first_id, path)
            for row in range(self.shard.count if not self.findings else 0):
                if len(self.findings) >= MAX_FINDINGS_PER_SHARD:
                    self.findings.append(Finding(self.where, "further samples were not checked"))
                    break
                payload, facts, text = (bytes(buffer[m.offset : m.offset + m.size]) for m in members[3 * row : 3 * row + 3])
                self._check_sample(f"{self.where}: {first_id + row:09d}", payload, facts, text)
                if row % PROGRESS_SAMPLES == PROGRESS_SAMPLES - 1:
                    advance(PROGRESS_SAMPLES)
            self._check_records(buffer, members, path)
        return self.findings

    def _check_names(self, members: list[Member], first_id: int, path: Path) -> None:
        extensions = (self.manifest.extension, "json", "txt")
        expected = [f"{sample_id:09d}.{e}" for sample_id in range(first_id, first_id + self.shard.count) for e in extensions]
        names = [member.name for member in members]
        if names != expected:
            wrong = next(
                (k for k, (name, want) in enumerate(zip(names, expected, strict=False)) if name != want), min(len(names), len(expected))
            )
            got = names[wrong] if wrong < len(names) else "the end"
            self.findings.append(Finding(self.where, "wrong members", expected[wrong] if wrong < len(expected) else "the end", got))
        elif path.with_name(self.shard.index_name).read_bytes() != index_text([members[k : k + 3] for k in range(0, len(members), 3)]):
            self.findings.append(Finding(self.where.removesuffix(".tar") + ".idx", "the index is not that of its shard"))

    def _check_records(self, buffer: memoryview, members: list[Member], path: Path) -> None:
        """The record index byte by byte. Without it nothing is lost, but each loader reads the whole shard before it starts."""
        if self.findings:
            return
        where = self.where.removesuffix(".tar") + ".records"
        try:
            found = path.with_name(self.shard.records_name).read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            self.findings.append(Finding(where, "missing" if missing else f"cannot be read: {error.strerror or error}"))
            return
        derived = derive_records(buffer, members, num_captions=self.manifest.num_captions, where=self.where)
        if found != record_index_bytes(derived, tar_bytes=self.shard.bytes, tar_sha256=self.shard.sha256):
            self.findings.append(Finding(where, "the record index is not that of its shard"))

    def _check_sample(self, where: str, payload: bytes, facts_json: bytes, text: bytes) -> None:
        try:
            facts = self.decoder.decode(facts_json)
            tiles = decode_payload(memoryview(payload), self.manifest, where=where)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self.findings.append(Finding(f"{where}.json", "damaged", "", str(error)))
            return
        except PairclipError as error:
            self.findings.append(Finding(where, error.what, str(error.expected or ""), str(error.got or "")))
            return
        count = len(self.manifest.class_names)
        if not (0 <= facts.left < count and 0 <= facts.right < count and facts.caption_id == facts.left * count + facts.right):
            got = f"left {facts.left}, right {facts.right}, caption_id {facts.caption_id}"
            self.findings.append(Finding(f"{where}.json", "the ids contradict each other", f"left * {count} + right", got))
        elif text != self.bank[facts.caption_id].encode():
            self.findings.append(
                Finding(f"{where}.txt", "not the caption of its id", self.bank[facts.caption_id], text.decode("utf-8", "replace"))
            )
        for source, tile in zip((facts.left_source, facts.right_source), tiles, strict=True):
            content = b"" if self.manifest.encoding == "jpeg" else hashlib.sha256(tile.tobytes()).digest()
            if self.images.contents.setdefault(source, content) != content:
                self.findings.append(Finding(where, "a source image has other pixels here than in another pair", "", source))


def _check_split(split: str, manifest: Manifest, images: _Images) -> list[Finding]:
    """The split's used images against the digests of the manifest."""
    entry, findings = manifest.splits[split], []
    checks = [("the images of the split are not the manifest's", entry.ids_sha256, ids_digest(set(images.contents)))]
    if manifest.encoding != "jpeg":
        checks.append(
            ("the pixels of the split are not the manifest's", entry.contents_sha256, contents_digest(set(images.contents.values())))
        )
    for problem, expected, got in checks:
        if expected != got:
            findings.append(Finding(split, problem, expected, got))
    if len(images.contents) != entry.used_images:
        findings.append(Finding(split, "number of images", f"{entry.used_images:,}", f"{len(images.contents):,}"))
    return findings


def _check_disjoint(images: dict[str, _Images]) -> list[Finding]:
    """No image, and between train and val no picture, may be in two splits."""
    findings = []
    names = list(images)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            shared = images[first].contents.keys() & images[second].contents.keys()
            if shared:
                findings.append(Finding(f"{first}, {second}", "an image is in both splits", "none", f"{len(shared):,}, as {min(shared)}"))
    if "val" in images:
        same = (set(images["train"].contents.values()) & set(images["val"].contents.values())) - {b""}
        if same:
            findings.append(Finding("train, val", "pictures with the same pixels in both splits", "none", f"{len(same):,}"))
    return findings
