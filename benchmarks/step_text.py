"""The frozen text encoder that the report runs in every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairclip_fast.events import EventLog
from pairclip_fast.text.sentence import find_minilm, load_sentence_encoder

WORDS, WIDTH, HEADS, MLP_WIDTH, DEPTH = 30_522, 384, 12, 1_536, 6
"""Sizes of MiniLM-L6 (its config.json)."""
TOKENS = 19
"""Of a stand-in's caption; a template's caption has about as many word pieces."""


def text_tower(*, events: EventLog) -> tuple[str, Callable[[list[str]], Tensor], int]:
    """Name, function and width of a frozen text encoder: MiniLM, or random weights of its size where it is not installed."""
    files = find_minilm()
    if files is not None:
        encoder = load_sentence_encoder(files, device=torch.device("cpu"))
        return encoder.model, lambda captions: encoder.encode(captions, events=events), encoder.dim
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, MLP_WIDTH, activation="gelu", batch_first=True)
    tower = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False).eval().requires_grad_(False)
    words = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def embed(captions: list[str]) -> Tensor:
        rows = [torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(_number(one))) for one in captions]
        return F.normalize(tower(words[torch.stack(rows)]).mean(dim=1), dim=-1)

    return "stand-in: random weights of MiniLM-L6's size", embed, WIDTH


def _number(caption: str) -> int:
    return int.from_bytes(caption.encode()[-30:], "little") % 2**31
