"""The built-in features: golden values, and the properties that make them trainable against."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.events import EventLog
from pairclip_fast.text.hashed import DIM, HashedEncoder

from .conftest import CLASSES, TEMPLATE

QUIET = EventLog(console=False)


def encode(*captions: str) -> torch.Tensor:
    return HashedEncoder().encode(captions, events=QUIET)


def test_golden_values() -> None:
    """Fixed for ever under this version's name: a bank made on one machine fits a run on any other."""
    features = encode(TEMPLATE.format(left="red star", right="blue ring"), "", "Stra\u00dfe 7")
    assert hashlib.sha256(features.numpy().tobytes()).hexdigest() == GOLDEN_BYTES
    assert HashedEncoder().digest == GOLDEN_DIGEST


def test_it_is_the_sum_of_its_word_vectors() -> None:
    """Written out once more, slowly and by another route: Python integers instead of numpy."""

    def sign(key: str, i: int) -> int:
        byte = hashlib.shake_256(f"hashed-1 {key}".encode()).digest(DIM // 8)[i // 8]
        return 1 if byte >> (7 - i % 8) & 1 else -1

    keys = ["start 0 red", "start 1 star", "end 1 red", "end 0 star"]
    sums = [sum(sign(key, i) for key in keys) for i in range(DIM)]
    expected = np.array(sums) / np.sqrt(sum(s * s for s in sums))
    assert np.array_equal(encode("Red  star")[0].numpy(), expected.astype(np.float32))


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.integers(1, 5))
def test_any_text_gives_a_unit_vector_that_depends_on_it_alone(captions: list[str], batch_size: int) -> None:
    together = HashedEncoder().encode(captions, events=QUIET, batch_size=batch_size)
    assert together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=1), torch.ones(len(captions)), atol=1e-6)
    assert torch.equal(together, torch.cat([encode(caption) for caption in captions]))


def test_different_words_are_nearly_orthogonal() -> None:
    features = encode(*(f"word{i}" for i in range(200)))
    cosines = features @ features.T - torch.eye(200)
    assert float(cosines.abs().max()) < 6 / DIM**0.5
    assert abs(float(cosines.mean())) < 0.01


def test_order_matters() -> None:
    features = encode("cat dog", "dog cat", "cat cat")
    assert float(features[0] @ features[1]) < 0.2
    swapped = encode(TEMPLATE.format(left="cat", right="dog"), TEMPLATE.format(left="dog", right="cat"))
    assert float(swapped[0] @ swapped[1]) < 0.9


def test_a_bag_of_words_would_be_caught() -> None:
    """Control: without positions a caption and its swap coincide."""

    def bag(caption: str) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack([encode(word)[0] for word in sorted(caption.split())]).sum(0), dim=0)

    assert float(bag("cat dog") @ bag("dog cat")) > 0.999


def test_a_linear_map_can_read_both_sides() -> None:
    """What a model has to learn: from a caption's feature, the left and the right class are linearly decodable."""
    pairs = [(left, right) for left in range(len(CLASSES)) for right in range(len(CLASSES))]
    features = encode(*(TEMPLATE.format(left=CLASSES[a], right=CLASSES[b]) for a, b in pairs)).double()
    for side in (0, 1):
        target = torch.nn.functional.one_hot(torch.tensor([pair[side] for pair in pairs])).double()
        prediction = features @ torch.linalg.lstsq(features, target, driver="gelsd").solution
        assert torch.equal(prediction.argmax(1), target.argmax(1))


@pytest.mark.parametrize("caption", ["cat", "CAT", "  cat\n"])
def test_case_and_spacing_do_not_count(caption: str) -> None:
    assert torch.equal(encode(caption), encode("cat"))


GOLDEN_DIGEST = "b5f1811a86e5a2829785df1acded01abff8264d2ab8bdbc210e848d03ba33049"
GOLDEN_BYTES = "7d9d9801dbdbafc83a38ab91c54be493321e92db1860626eb107c18075c22b41"
