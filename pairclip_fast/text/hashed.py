"""`hashed`: text features without a model, so that training works anywhere, offline, bit-equal on every platform.

A caption is the sum of random sign vectors, two per word: one keyed by (word, place counted from the start), one by
(word, place counted from the end). Different words are nearly orthogonal (cosine about 1/sqrt(dim)), swapping two words
changes the sum, and a class name of two words moves the words on one side of it only in one of the two counts. All sums
are small integers, so the result does not depend on the order of additions, the BLAS or the CPU. There is no meaning in
these features: "cat" is as far from "kitten" as from "rocket".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from pairclip_fast.events import EventLog
from pairclip_fast.text.encoders import DEFAULT_BATCH_SIZE

DIM = 512
"""As wide as CLIP ViT-B's embeddings, so that models fit either."""
VERSION = "hashed-1"
"""Part of every hash: change it whenever the features change."""


class HashedEncoder:
    """Deterministic random features of a caption's words and their positions."""

    name = "hashed"
    model = VERSION
    features = "pooled"
    dim = DIM

    def __init__(self) -> None:
        self.digest = hashlib.sha256(f"{VERSION} dim {DIM}".encode()).hexdigest()

    def encode(self, captions: Sequence[str], *, events: EventLog, batch_size: int = DEFAULT_BATCH_SIZE) -> Float[Tensor, "n d"]:
        """L2-normalised float32 features, one row per caption; a pure function of each caption.

        Args:
            captions: Any number of texts; case does not matter, words are what white space separates.
            events: Shown the progress.
            batch_size: How often the progress moves; the result does not depend on it.
        """
        rows = np.empty((len(captions), DIM), np.float32)
        known: dict[str, Int8[np.ndarray, " dim"]] = {}
        with events.progress("embedding captions (hashed)", len(captions), unit="captions") as advance:
            for start in range(0, len(captions), batch_size):
                chunk = captions[start : start + batch_size]
                for row, caption in enumerate(chunk, start):
                    rows[row] = _feature(caption, known)
                advance(len(chunk))
        return torch.from_numpy(rows)


def _feature(caption: str, known: dict[str, Int8[np.ndarray, " dim"]]) -> Float[np.ndarray, " dim"]:
    total = np.zeros(DIM, np.int64)
    # An empty caption is one empty word: every caption has a direction.
    words = caption.casefold().split() or [""]
    for place, word in enumerate(words):
        for key in (f"start {place} {word}", f"end {len(words) - 1 - place} {word}"):
            if key not in known:
                known[key] = _signs(key)
            total += known[key]
    # Squared norm is an exact integer; division and square root are correctly rounded everywhere (IEEE 754).
    unit: Float[np.ndarray, " dim"] = (total / np.sqrt(float(total @ total))).astype(np.float32)
    return unit


def _signs(key: str) -> Int8[np.ndarray, " dim"]:
    """512 random signs from SHAKE-256: specified bit by bit, unlike any library's random generator."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(f"{VERSION} {key}".encode()).digest(DIM // 8), np.uint8))
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)
