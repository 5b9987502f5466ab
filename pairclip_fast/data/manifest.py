"""The manifest of a data folder: what is in it, how it came about, and the digests that prove it.

It is the only file that is trusted, and only after every field was checked: types, ranges, shard names, totals. Nothing
in it is ever used as a path beyond the fixed pattern `<split>/<6 digits>.tar`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from pairclip_fast.data.places import MANIFEST_NAME
from pairclip_fast.errors import DataError
from pairclip_fast.storage import REAL, FileSystem, write_json

FORMAT = 1
CAPTIONS_NAME = "captions.safetensors"
"""Written later, by the text room."""
CAPTIONS_TEMPORARY = ".captions"
"""How its temporary files start."""
SPLITS = ("train", "val", "test")
EXTENSIONS = {"raw": "rgb", "png": "png", "jpeg": "jpg"}
MAX_MANIFEST_BYTES = 64 << 20
MAX_SIDE = 4_096
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
REBUILD = "make the folder again: `pairclip-fast shard` with the arguments it was made with, its --out and --overwrite"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar and its DALI index."""

    name: str
    count: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """File name of the text index beside the tar."""
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def records_name(self) -> str:
        """File name of the record index beside the tar; see `records`."""
        return self.name.removesuffix(".tar") + ".records"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """One split: its shards, and digests of the images its pairs use."""

    count: int
    """Pairs."""
    images: int
    """Images assigned to the split."""
    used_images: int
    """Of these, images that occur in at least one pair."""
    ids_sha256: str
    """Over the sorted source ids of the used images, each followed by a line end."""
    contents_sha256: str
    """Over the sorted, distinct SHA-256 digests of the used images' pixels."""
    shards: tuple[ShardEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitProof:
    """Counts that show that the split was made by image; the digests that back them are in the splits."""

    shared_ids: int
    """Source ids in more than one split: 0."""
    shared_contents_train_val: int
    """Pixel contents in both train and val: 0."""
    duplicate_images: int
    """Images of the source whose pixels occur more than once there; all copies went to the same side."""
    test_contents_in_train: int
    """Distinct test pictures that also occur, pixel by pixel, among the train or val images of the source (they are kept)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole data folder."""

    format: int
    source: str
    description: str
    class_names: tuple[str, ...]
    template: str
    seed: int
    encoding: Literal["raw", "png", "jpeg"]
    tiles: int
    tile_height: int
    tile_width: int
    mean: tuple[float, float, float]
    """Per channel, of the train images, in units of 0..255."""
    std: tuple[float, float, float]
    splits: dict[str, SplitManifest]
    split_proof: SplitProof
    arguments: dict[str, str | int | float | None]
    """What the folder was made from: the options that matter and a digest of the source images."""
    skipped: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def extension(self) -> str:
        """File-name extension of the payload members."""
        return EXTENSIONS[self.encoding]

    @property
    def num_captions(self) -> int:
        """Captions of the bank: one per ordered pair of classes."""
        return len(self.class_names) ** 2

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the data; how it is worded (description, notes) does not count."""
        value = {key: item for key, item in msgspec.to_builtins(self).items() if key not in ("description", "notes")}
        return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest, *, fs: FileSystem = REAL) -> None:
    """Write `folder`/manifest.json atomically."""
    write_json(folder / MANIFEST_NAME, msgspec.to_builtins(manifest), fs=fs)


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a data folder.

    Raises:
        DataError: missing, empty, malformed, inconsistent, or from a newer version.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError("the manifest is implausibly large", where=path, expected=f"at most {MAX_MANIFEST_BYTES:,} bytes", fix=REBUILD)
        data = path.read_bytes()
    except FileNotFoundError:
        fix = f"make it with `pairclip-fast shard --out {folder}`"
        raise DataError("this is not a data folder: it has no manifest", where=path, fix=fix) from None
    except OSError as error:
        raise DataError("the manifest cannot be read", where=path, got=error.strerror, fix=REBUILD) from error
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            fix = "update pairclip-fast" if version > FORMAT else REBUILD
            raise DataError("the data folder has another format version", where=path, expected=FORMAT, got=version, fix=fix)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DataError("the manifest is damaged", where=path, got=str(error) or type(error).__name__, fix=REBUILD) from error
    for problem in _problems(manifest):
        raise DataError("the manifest contradicts itself", where=path, got=problem, fix=REBUILD)
    return dataclasses.replace(manifest, splits={name: manifest.splits[name] for name in SPLITS if name in manifest.splits})


class _Version(msgspec.Struct):
    format: int


def _problems(manifest: Manifest) -> list[str]:
    """What the types cannot say."""
    names = manifest.class_names
    checks = [
        (len(names) >= 2 and len(set(names)) == len(names), "class_names: two or more, all different"),
        (set(manifest.splits) <= set(SPLITS) and "train" in manifest.splits, f"splits: train and any of {SPLITS}"),
        (1 <= manifest.tiles <= MAX_SIDE, "tiles out of range"),
        (min(manifest.tile_height, manifest.tile_width) >= 1, "tile size out of range"),
        (max(manifest.tile_height, manifest.tile_width) <= MAX_SIDE, "tile size out of range"),
        (all(0.0 <= value <= 255.0 for value in (*manifest.mean, *manifest.std)), "mean or std out of range"),
        (all(value > 0.0 for value in manifest.std), "std must be positive"),
    ]
    problems = [text for good, text in checks if not good]
    for split, entry in manifest.splits.items():
        problems += [f"{split}: {text}" for text in _split_problems(entry)]
    return problems


def _split_problems(split: SplitManifest) -> list[str]:
    problems = []
    if split.count < 1 or sum(shard.count for shard in split.shards) != split.count:
        problems.append("the shard counts do not add up to the count")
    for number, shard in enumerate(split.shards):
        if shard.name != f"{number:06d}.tar":
            problems.append(f"shard name {shard.name!r} instead of '{number:06d}.tar'")
        if min(shard.count, shard.bytes, shard.index_bytes) < 1:
            problems.append(f"{shard.name}: sizes must be positive")
        if not (SHA256_PATTERN.fullmatch(shard.sha256) and SHA256_PATTERN.fullmatch(shard.index_sha256)):
            problems.append(f"{shard.name}: not a SHA-256 digest")
    return problems


def to_json(value: Any) -> Any:
    """Dataclasses as plain JSON values."""
    return msgspec.to_builtins(value)
