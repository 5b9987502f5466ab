"""What a text encoder is, and the batching that every transformer shares.

Captions of one template are short and nearly equally long: sorted by length and padded to the longest of their batch
they cost almost no padding. Equal token sequences are embedded once, so that captions that the tokenizer cannot tell
apart get bit-equal features and end up in one group of the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.kernels.exact import exact_products

DEFAULT_BATCH_SIZE = 256

Forward = Callable[[Tensor, Tensor], Tensor]
"""(token ids i64[batch, tokens], mask bool[batch, tokens]) -> one feature row per caption, not normalised."""


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen map from captions to unit vectors."""

    name: str
    """Kind: clip, minilm, sentence or hashed."""
    model: str
    """Which model of that kind, as its publisher calls it."""
    digest: str
    """SHA-256 that changes whenever the features could."""
    features: str
    """`projected` or `pooled`."""
    dim: int

    def encode(self, captions: Sequence[str], *, events: EventLog, batch_size: int = DEFAULT_BATCH_SIZE) -> Float[Tensor, "n d"]:
        """L2-normalised float32 features on the CPU, one row per caption, in the order given."""
        ...


class TransformerEncoder:
    """Tokenize, sort, batch, forward, normalise; what differs between models is in `forward`.

    Args:
        name: Kind of encoder (see `TextEncoder`).
        model: Name of the model.
        digest: Digest of its files.
        features: `projected` or `pooled`.
        dim: Width of the features.
        tokenizer: A transformers tokenizer.
        forward: Features of one padded batch.
        max_tokens: Longest sequence the model takes; longer captions are cut, and said.
        device: Where `forward` computes.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        digest: str,
        features: str,
        dim: int,
        tokenizer: Any,
        forward: Forward,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.name, self.model, self.digest, self.features, self.dim = name, model, digest, features, dim
        self._tokenizer, self._forward, self._max_tokens, self._device = tokenizer, forward, max_tokens, device

    def encode(self, captions: Sequence[str], *, events: EventLog, batch_size: int = DEFAULT_BATCH_SIZE) -> Float[Tensor, "n d"]:
        """L2-normalised float32 features on the CPU, one row per caption, in the order given.

        Args:
            captions: Any number of texts.
            events: Told about captions that had to be cut, and shown the progress.
            batch_size: Captions per forward pass; changes the result by rounding only.

        Raises:
            EnvironmentLackingError: the model yields features that are not finite (damaged weights).
        """
        sequences = self._token_ids(captions, events=events)
        distinct = sorted(set(sequences), key=lambda ids: (len(ids), ids))
        position = {ids: row for row, ids in enumerate(distinct)}
        rows = torch.empty(len(distinct), self.dim)
        progress = events.progress(f"embedding captions ({self.name})", len(distinct), unit="captions")
        with torch.inference_mode(), exact_products(self._device), progress as advance:
            for start in range(0, len(distinct), batch_size):
                batch = distinct[start : start + batch_size]
                ids, mask = self._padded(batch)
                output = self._forward(ids.to(self._device), mask.to(self._device)).float()
                rows[start : start + len(batch)] = torch.nn.functional.normalize(output, dim=-1).cpu()
                advance(len(batch))
        if not bool(rows.isfinite().all()):
            raise EnvironmentLackingError(
                "the text encoder yields features that are not finite", where=self.model, fix="fetch its files again, or choose another"
            )
        return rows[torch.tensor([position[ids] for ids in sequences], dtype=torch.int64)]

    def _token_ids(self, captions: Sequence[str], *, events: EventLog) -> list[tuple[int, ...]]:
        encoded = self._tokenizer(list(captions), truncation=True, max_length=self._max_tokens, return_attention_mask=False)
        sequences = [tuple(ids) for ids in encoded["input_ids"]]
        cut = sum(len(ids) == self._max_tokens for ids in sequences)
        if cut:
            events.note(f"{cut:,} of {len(sequences):,} captions reach the text encoder's {self._max_tokens} tokens and may have been cut")
        return sequences

    def _padded(self, batch: list[tuple[int, ...]]) -> tuple[Int64[Tensor, "b tokens"], Bool[Tensor, "b tokens"]]:
        length = max(len(ids) for ids in batch)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in batch], dtype=torch.int64)
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in batch])
        return ids, mask
