"""Split and pairing as properties, each property also tried on a deliberately wrong version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.data.keyed import permutation, random_uniform
from pairclip_fast.data.pairs import Pairs, caption, captions, make_pairs, split_images
from pairclip_fast.errors import ConfigError, DataError

LABELS = st.lists(st.integers(0, 4), min_size=4, max_size=60).map(lambda values: np.array(values, dtype=np.int64))

GOLDEN_PERMUTATION = [3, 4, 0, 2, 7, 5, 1, 6]
GOLDEN_UNIFORM = [0.26354711408834086, 0.6126637297422363]


def use_counts_differ_by_one(pairs: Pairs, indices: np.ndarray) -> bool:
    return all(np.ptp([np.sum(side == index) for index in indices]) <= 1 for side in (pairs.left, pairs.right))


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_a_permutation_holds_every_position_once_and_depends_on_seed_and_stream(count: int, seed: int) -> None:
    order = permutation(count, seed=seed, stream="a")
    assert sorted(order.tolist()) == list(range(count))
    assert (order == permutation(count, seed=seed, stream="a")).all()
    if count > 30:
        assert (order != permutation(count, seed=seed, stream="b")).any()
        assert (order != permutation(count, seed=seed ^ 1, stream="a")).any()


def test_permutations_put_every_item_everywhere_equally_often() -> None:
    trials, count = 4_000, 5
    table = np.zeros((count, count))
    for seed in range(trials):
        table[np.arange(count), permutation(count, seed=seed, stream="x")] += 1
    expected = trials / count
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 40  # 16 degrees of freedom: 99.9 % below 39.3


def test_the_random_words_are_pinned() -> None:
    """They decide the content of every data folder: a change here is a change of format."""
    assert permutation(8, seed=0, stream="golden").tolist() == GOLDEN_PERMUTATION
    assert random_uniform(2, seed=0, stream="golden").tolist() == GOLDEN_UNIFORM


@given(LABELS, st.floats(0.05, 0.95), st.integers(0, 1000), st.data())
def test_split_is_a_partition_that_keeps_copies_together(labels: np.ndarray, fraction: float, seed: int, data: st.DataObject) -> None:
    groups = np.array(data.draw(st.lists(st.integers(0, len(labels)), min_size=len(labels), max_size=len(labels))))
    try:
        train, val = split_images(labels, val_fraction=fraction, seed=seed, groups=groups)
    except DataError:
        _, first = np.unique(groups, return_index=True)
        assert max(np.bincount(labels[first])) < 2  # only if no class has two different pictures
        return
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert not set(groups[train]) & set(groups[val])


@given(st.integers(2, 6), st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_split_is_stratified(classes: int, per_class: int, fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(classes), per_class)
    _, val = split_images(labels, val_fraction=fraction, seed=seed)
    expected = min(max(round(fraction * per_class), 1), per_class - 1)
    assert np.bincount(labels[val], minlength=classes).tolist() == [expected] * classes


def test_split_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(4), 50)
    first, second = (split_images(labels, val_fraction=0.5, seed=seed)[1] for seed in (0, 1))
    assert (first != second).any()


@given(LABELS, st.integers(1, 200), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 1000))
def test_pairs_use_images_equally_and_obey_the_probability(labels: np.ndarray, count: int, probability: float, seed: int) -> None:
    indices = np.flatnonzero(np.arange(len(labels)) % 3 != 1)
    arguments = {"num_classes": 5, "num_pairs": count, "seed": seed, "stream": "pairs/train"}
    try:
        pairs = make_pairs(labels, indices, different_class_probability=probability, **arguments)
    except ConfigError:
        whole, rest = divmod(count, len(indices))
        images = np.bincount(labels[indices]).max()
        assert 2 * (whole * images + min(images, rest)) > count  # a class may fill more than half of both sides together
        return
    assert len(pairs.left) == len(pairs.right) == count
    assert set(pairs.left) | set(pairs.right) <= set(indices.tolist())
    assert use_counts_differ_by_one(pairs, indices)
    assert (pairs.caption_ids == labels[pairs.left] * 5 + labels[pairs.right]).all()
    must_differ = random_uniform(count, seed=seed, stream="pairs/train/differ") < probability
    assert (labels[pairs.left] != labels[pairs.right])[must_differ].all()


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.1), (0.5, 0.05), (1.0, 0.0)])
def test_share_of_same_class_pairs(probability: float, expected: float) -> None:
    labels = np.repeat(np.arange(10), 400)
    pairs = make_pairs(
        labels, np.arange(4000), num_classes=10, num_pairs=40_000, different_class_probability=probability, seed=3, stream="p"
    )
    same = float((labels[pairs.left] == labels[pairs.right]).mean())
    assert abs(same - expected) < 0.006  # 4 standard deviations
    assert use_counts_differ_by_one(pairs, np.arange(0, 4000, 97))


def test_all_pairs_of_classes_are_about_equally_likely() -> None:
    labels = np.repeat(np.arange(5), 40)
    pairs = make_pairs(labels, np.arange(200), num_classes=5, num_pairs=50_000, different_class_probability=1.0, seed=0, stream="p")
    table = np.bincount(pairs.caption_ids, minlength=25).reshape(5, 5)
    others = table[~np.eye(5, dtype=bool)]
    assert np.trace(table) == 0
    assert abs(others / 2_500 - 1).max() < 0.08


def test_a_class_with_most_of_the_images_cannot_always_be_paired_with_others() -> None:
    labels = np.array([0] * 70 + [1] * 30)
    with pytest.raises(ConfigError, match="class 0 has 70%"):
        make_pairs(labels, np.arange(100), num_classes=2, num_pairs=100, different_class_probability=1.0, seed=0)


def test_two_classes_of_equal_size_can() -> None:
    labels = np.array([0, 1] * 50)
    pairs = make_pairs(labels, np.arange(100), num_classes=2, num_pairs=100, different_class_probability=1.0, seed=0)
    assert (labels[pairs.left] != labels[pairs.right]).all()


def test_independent_draws_would_not_pass() -> None:
    """The control: what this module exists to avoid is seen by the property."""
    draws = np.random.default_rng(0).integers(0, 50, (2, 50))
    assert not use_counts_differ_by_one(Pairs(draws[0], draws[1], draws[0]), np.arange(50))


def test_captions_follow_their_ids() -> None:
    names, template = ["cat", "dog", "eel"], "{right} beside {left}"
    bank = captions(names, template)
    assert len(bank) == 9
    assert bank[1 * 3 + 2] == "eel beside dog" == caption("dog", "eel", template)


@pytest.mark.parametrize("template", ["{left.__class__}", "{0}", "{left!r}", "{left:>9}", "{", "{middle}", "no field", "{left[0]}"])
def test_templates_with_anything_but_the_two_fields_are_refused(template: str) -> None:
    with pytest.raises(ConfigError):
        captions(["a", "b"], template)


def test_braces_can_be_written() -> None:
    assert caption("a", "b", "{{{left}}} {right}") == "{a} b"
