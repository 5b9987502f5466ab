"""Philox4x32-10 against the published vectors and against scalar arithmetic on Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.data.philox import bounded, philox4x32, seed_key, unit_interval

WORD = st.integers(0, 2**32 - 1)
# kat_vectors of Random123 (philox4x32, 10 rounds): counter, key, result.
KNOWN = [
    ((0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    assert tuple(philox4x32(np.array(counter, dtype=np.uint32), key=key).tolist()) == result
    assert scalar_philox(counter, key) == result


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), st.tuples(WORD, WORD))
def test_vectorised_equals_scalar(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    blocks = philox4x32(np.array(counters, dtype=np.uint32), key=key)
    assert blocks.dtype == np.uint32
    assert [tuple(block) for block in blocks.tolist()] == [scalar_philox(counter, key) for counter in counters]


def test_shape_is_kept_and_checked() -> None:
    assert philox4x32(np.zeros((3, 5, 4), dtype=np.uint32), key=(1, 2)).shape == (3, 5, 4)
    with pytest.raises(ValueError, match="4 words"):
        philox4x32(np.zeros((4, 3), dtype=np.uint32), key=(1, 2))


def test_both_words_of_the_seed_count() -> None:
    assert seed_key(2**63 - 1) == (0xFFFFFFFF, 0x7FFFFFFF)
    assert seed_key(1) != seed_key(1 + 2**32)


def test_units_and_bounds_at_the_ends() -> None:
    words = np.array([0, 255, 256, 2**31, 2**32 - 1], dtype=np.uint32)
    units = unit_interval(words)
    assert units.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24]
    assert np.array_equal(units, units.astype(np.float32))
    assert bounded(words, count=7).tolist() == [0, 0, 0, 3, 6]
    assert bounded(words, count=1).tolist() == [0] * 5
