"""Which image goes into which split, and which two images make a pair. Pure functions of (labels, seed); no torch, no files.

The split is made by image, never by pair, and copies of one picture (CIFAR-100 has some) stay on one side. Pairs come
from keyed permutations rather than from independent draws, so that every image is used equally often on each side: with
draws, 37 % of the images would be missing from the left of an epoch's worth of pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from pairclip_fast.data.keyed import permutation, random_uniform
from pairclip_fast.data.options import check_template
from pairclip_fast.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
MAX_REPAIR_PROBES = 64
"""Random partners to look at before searching all of them; with 100 classes the first is good in 98 % of cases."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pairs:
    """N pairs: indices of the left and the right image, and the caption id left_label * num_classes + right_label."""

    left: Ints
    right: Ints
    caption_ids: Ints


def caption(left: str, right: str, template: str) -> str:
    """The caption of one pair of class names.

    Raises:
        ConfigError: the template has other fields than {left} and {right}.
    """
    check_template(template)
    return template.format(left=left, right=right)


def captions(class_names: tuple[str, ...] | list[str], template: str) -> list[str]:
    """All num_classes^2 captions; the id of (left, right) is left * num_classes + right.

    Raises:
        ConfigError: the template has other fields than {left} and {right}.
    """
    check_template(template)
    return [template.format(left=left, right=right) for left in class_names for right in class_names]


def split_images(labels: Ints, *, val_fraction: float, seed: int, groups: Ints | None = None) -> tuple[Ints, Ints]:
    """Split images into train and val, the same share of every class, copies of one picture together.

    Args:
        labels: int64 [n], class of each image.
        val_fraction: Share of each class that goes to val, rounded, but at least one picture of every class that has two.
        seed: Seed of the choice.
        groups: int64 [n], equal for images that must stay together (copies); default: none are copies. A group that
            spans classes counts for the class of its first image.

    Returns:
        Two sorted index arrays, disjoint, together 0..n-1.

    Raises:
        DataError: there is no image for one of the sides.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of)
    group_labels = labels[first]
    order = permutation(len(first), seed=seed, stream="split")
    in_val = np.zeros(len(first), dtype=bool)
    for label in np.unique(labels):
        candidates = order[group_labels[order] == label]
        if len(candidates) > 1:
            in_val[_fill(candidates, sizes, round(val_fraction * int(sizes[candidates].sum())))] = True
    val = in_val[group_of]
    if val.all() or not val.any():
        raise DataError("too few different images to hold some out", expected="two or more of some class", got=f"{len(first)} in all")
    return np.flatnonzero(~val), np.flatnonzero(val)


def _fill(candidates: Ints, sizes: Ints, wanted: int) -> Ints:
    """The first groups, in order, that fit into `wanted` images; at least the smallest one, and never all."""
    chosen: list[int] = []
    taken = 0
    for group in candidates.tolist():
        if taken + sizes[group] <= wanted and len(chosen) < len(candidates) - 1:
            chosen.append(group)
            taken += int(sizes[group])
    return np.array(chosen or [int(candidates[np.argmin(sizes[candidates])])], dtype=np.int64)


def make_pairs(
    labels: Ints, indices: Ints, *, num_classes: int, num_pairs: int, different_class_probability: float, seed: int, stream: str = ""
) -> Pairs:
    """Pair the images `indices` with each other; each is used floor or ceil(num_pairs / len(indices)) times on each side.

    Both sides run through independent permutations of the images, one after the other until there are enough. A pair
    that must have two classes (each with the given probability) and does not swaps its right image with another pair's,
    which leaves the use counts alone.

    Args:
        labels: int64 [n], class of every image of the source.
        indices: int64 [m], the images of this split.
        num_classes: Classes of the source.
        num_pairs: Pairs to make.
        different_class_probability: P(the right image is from another class than the left); else it is from any class.
        seed: Seed of everything.
        stream: Name that makes splits independent of each other.

    Raises:
        ConfigError: the probability cannot be met, because one class holds too large a share of the images.
        DataError: there are no images.
    """
    if len(indices) == 0:
        raise DataError("there are no images to make pairs of", where=stream or None)
    left = _cycle(indices, num_pairs, seed=seed, stream=f"{stream}/left")
    right = _cycle(indices, num_pairs, seed=seed, stream=f"{stream}/right")
    must_differ = random_uniform(num_pairs, seed=seed, stream=f"{stream}/differ") < different_class_probability
    _repair(labels, left, right, must_differ, seed=seed, stream=f"{stream}/repair")
    return Pairs(left, right, labels[left] * num_classes + labels[right])


def _cycle(indices: Ints, count: int, *, seed: int, stream: str) -> Ints:
    """`count` images: whole permutations of `indices`, the last one cut."""
    rounds = -(-count // len(indices))
    orders = [indices[permutation(len(indices), seed=seed, stream=f"{stream}/{number}")] for number in range(rounds)]
    return np.concatenate(orders)[:count].astype(np.int64)


def _repair(labels: Ints, left: Ints, right: Ints, must_differ: npt.NDArray[np.bool_], *, seed: int, stream: str) -> None:
    """Swap right images, in place, until no pair that must have two classes has one.

    If no partner exists for a pair of class c, then every right image of another class already sits beside a c that needs
    it: the demand is infeasible, not merely unlucky.
    """
    left_labels, right_labels = labels[left], labels[right]
    count = len(left)
    for number, pair in enumerate(np.flatnonzero(must_differ & (left_labels == right_labels)).tolist()):
        label = left_labels[pair]
        if right_labels[pair] != label:
            continue  # an earlier swap took its right image
        probes = (random_uniform(MAX_REPAIR_PROBES, seed=seed, stream=f"{stream}/{number}") * count).astype(np.int64)
        for partners in (probes, np.arange(count)):
            good = (right_labels[partners] != label) & ~(must_differ[partners] & (left_labels[partners] == label))
            if good.any():
                break
        else:
            share = float((left_labels == label).mean())
            raise ConfigError(
                "too few images of other classes to pair with",
                where="--different-class-prob",
                got=f"class {label} has {share:.0%} of the images",
                fix="lower the probability or even out the classes",
            )
        other = int(partners[np.argmax(good)])
        right[pair], right[other] = right[other], right[pair]
        right_labels[pair], right_labels[other] = right_labels[other], right_labels[pair]
