"""From decoded images to everything a data folder will hold, before a byte is written: splits, pairs, captions, proof."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from pairclip_fast.config import TILES
from pairclip_fast.data.manifest import FORMAT, Manifest, ShardEntry, SplitManifest, SplitProof
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.pairs import Ints, Pairs, captions, make_pairs, split_images
from pairclip_fast.data.sources.base import ImageSet, Sources, channel_statistics, content_digests, source_digest
from pairclip_fast.errors import DataError


class PairSamples:
    """The pairs of one split as samples to write.

    Args:
        images: The part of the source that the split takes its images from.
        part: Name of that part, which starts every source id: train or test.
        pairs: The pairs.
        bank: All captions, by id.
    """

    def __init__(self, images: ImageSet, *, part: str, pairs: Pairs, bank: list[str]) -> None:
        self.images, self.part, self.pairs, self._bank = images, part, pairs, bank

    def __len__(self) -> int:
        return len(self.pairs.left)

    def tiles(self, index: int) -> npt.NDArray[np.uint8]:
        return self.images.images[[self.pairs.left[index], self.pairs.right[index]]]

    def facts(self, index: int) -> dict[str, Any]:
        left, right = int(self.pairs.left[index]), int(self.pairs.right[index])
        return {
            "left": int(self.images.labels[left]),
            "right": int(self.images.labels[right]),
            "caption_id": int(self.pairs.caption_ids[index]),
            "left_source": self.source_id(left),
            "right_source": self.source_id(right),
        }

    def caption(self, index: int) -> str:
        return self._bank[int(self.pairs.caption_ids[index])]

    def source_id(self, index: int) -> str:
        """Name of an image, unique over all parts of the source."""
        return f"{self.part}/{self.images.id(index)}"

    def used(self) -> list[int]:
        """Images that occur in at least one pair, sorted."""
        indices: list[int] = np.unique(np.concatenate([self.pairs.left, self.pairs.right])).tolist()
        return indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """One split to be written."""

    samples: PairSamples
    images: int
    ids_sha256: str
    contents_sha256: str
    used_images: int

    def manifest(self, shards: tuple[ShardEntry, ...]) -> SplitManifest:
        """The split's entry once its shards are written."""
        return SplitManifest(
            count=len(self.samples),
            images=self.images,
            used_images=self.used_images,
            ids_sha256=self.ids_sha256,
            contents_sha256=self.contents_sha256,
            shards=shards,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """A whole data folder to be written."""

    splits: dict[str, SplitPlan]
    proof: SplitProof
    arguments: dict[str, str | int | float | None]
    sources: Sources
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: tuple[str, ...]

    def manifest(self, options: ShardOptions, shards: dict[str, tuple[ShardEntry, ...]]) -> Manifest:
        """The folder's manifest once all shards are written."""
        train, test = self.sources.train, self.sources.test
        _, height, width, _ = train.images.shape
        return Manifest(
            format=FORMAT,
            source=train.source,
            description=self.sources.description,
            class_names=train.class_names,
            template=options.template,
            seed=options.seed,
            encoding=options.encoding,
            tiles=TILES,
            tile_height=height,
            tile_width=width,
            mean=self.mean,
            std=self.std,
            splits={split: plan.manifest(shards[split]) for split, plan in self.splits.items()},
            split_proof=self.proof,
            arguments=self.arguments,
            skipped=train.skipped + (test.skipped if test else ()),
            notes=self.notes,
        )


def plan_folder(sources: Sources, options: ShardOptions) -> FolderPlan:
    """Split the images, pair them and prove the split.

    Raises:
        DataError: too few images to split.
        ConfigError: --different-class-prob cannot be met.
    """
    train, test = sources.train, sources.test
    parts = {"train": train, **({"test": test} if test else {})}
    contents = {name: content_digests(part.images) for name, part in parts.items()}
    groups = _groups(contents["train"])
    train_indices, val_indices = split_images(train.labels, val_fraction=options.val_fraction, seed=options.seed, groups=groups)
    if len(np.unique(train.labels[train_indices])) < len(train.class_names):
        raise DataError("holding images out leaves a class without training images", expected=f"{len(train.class_names)} classes")
    chosen = {"train": ("train", train_indices), "val": ("train", val_indices)}
    if test:
        chosen["test"] = ("test", np.arange(len(test.labels)))
    bank = captions(train.class_names, options.template)
    splits = {}
    for split, (part, indices) in chosen.items():
        wanted = options.num_pairs if split == "train" and options.num_pairs else len(indices)
        splits[split] = _plan_split(parts[part], indices, contents[part], part=part, split=split, wanted=wanted, bank=bank, options=options)
    proof = _prove(splits, {split: [contents[part][i] for i in indices] for split, (part, indices) in chosen.items()}, groups)
    mean, std = channel_statistics(train.images[train_indices])
    return FolderPlan(
        splits=splits,
        proof=proof,
        arguments=_arguments(options, train.source, source_digest(parts, contents)),
        sources=sources,
        mean=mean,
        std=std,
        notes=_notes(sources, proof),
    )


def _plan_split(
    images: ImageSet, indices: Ints, contents: list[bytes], *, part: str, split: str, wanted: int, bank: list[str], options: ShardOptions
) -> SplitPlan:
    pairs = make_pairs(
        images.labels,
        indices,
        num_classes=len(images.class_names),
        num_pairs=wanted,
        different_class_probability=options.different_class_prob,
        seed=options.seed,
        stream=f"pairs/{split}",
    )
    samples = PairSamples(images, part=part, pairs=pairs, bank=bank)
    used = samples.used()
    return SplitPlan(
        samples=samples,
        images=len(indices),
        used_images=len(used),
        ids_sha256=ids_digest({samples.source_id(index) for index in used}),
        contents_sha256=contents_digest({contents[index] for index in used}),
    )


def ids_digest(ids: set[str]) -> str:
    """SHA-256 over sorted source ids, each followed by a line end."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode("utf-8", "backslashreplace")).hexdigest()


def contents_digest(contents: set[bytes]) -> str:
    """SHA-256 over sorted, distinct digests of image contents."""
    return hashlib.sha256(b"".join(sorted(contents))).hexdigest()


def _groups(contents: list[bytes]) -> Ints:
    """A number per image, equal for equal pixels: that of the first such image."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(content, index) for index, content in enumerate(contents)], dtype=np.int64)


def _prove(splits: dict[str, SplitPlan], contents: dict[str, list[bytes]], groups: Ints) -> SplitProof:
    """Count what must not be shared, from the samples themselves rather than from how the split was made."""
    ids = [{plan.samples.source_id(index) for index in plan.samples.used()} for plan in splits.values()]
    sets = {split: set(values) for split, values in contents.items()}
    _, copies = np.unique(groups, return_counts=True)
    proof = SplitProof(
        shared_ids=sum(len(group) for group in ids) - len(set().union(*ids)),
        shared_contents_train_val=len(sets["train"] & sets["val"]),
        duplicate_images=int(copies[copies > 1].sum()),
        test_contents_in_train=len(sets.get("test", set()) & (sets["train"] | sets["val"])),
    )
    assert proof.shared_ids == 0, "an image is in two splits"
    assert proof.shared_contents_train_val == 0, "a picture is in both train and val"
    return proof


def _arguments(options: ShardOptions, source: str, digest: str) -> dict[str, str | int | float | None]:
    """What determines the folder's bytes; a second run compares these."""
    return {
        "source": source,
        "source_sha256": digest,
        "num_pairs": options.num_pairs,
        "val_fraction": options.val_fraction,
        "different_class_prob": options.different_class_prob,
        "template": options.template,
        "encoding": options.encoding,
        "shard_size": options.shard_size,
        "seed": options.seed,
    }


def stand_in_note(sources: Sources) -> str:
    """What the manifest says of images that were not what the user hoped for."""
    return f"generated images stand in for CIFAR-100: {sources.fallback_reason}"


def _notes(sources: Sources, proof: SplitProof) -> tuple[str, ...]:
    notes = []
    if sources.fallback_reason:
        notes.append(stand_in_note(sources))
    if proof.test_contents_in_train:
        notes.append(f"{proof.test_contents_in_train:,} test pictures also occur among the training images of the source (kept)")
    if proof.duplicate_images:
        notes.append(f"{proof.duplicate_images:,} images of the source are copies of each other; all copies went to the same split")
    return tuple(notes)
