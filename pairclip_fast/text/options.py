"""What `pairclip-fast embed` can be told. Apart from the command so that the CLI can build it without importing torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pairclip_fast.config import DEFAULT_PRESET, require
from pairclip_fast.data.places import default_folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOptions:
    """Embed the captions of a data folder and inspect the bank they make."""

    data: Path = dataclasses.field(default_factory=default_folder)
    """The data folder that `shard` wrote."""
    text_encoder: str = "auto"
    """auto, clip, minilm, hashed, or the folder or hub id of a CLIP or sentence-transformers model."""
    batch_size: int = 256
    """Captions per forward pass."""
    features: Literal["projected", "pooled"] = "projected"
    """CLIP only: text embeddings after the projection (as CLIP compares them) or the pooled state before it."""
    preset: str = DEFAULT_PRESET
    """Whose temperature and whitening the inspection uses; the bank itself is the same for all."""
    json: bool = False
    """Print the summary as one JSON object."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "--batch-size", "1 or more", self.batch_size)
        require(self.features in ("projected", "pooled"), "--features", "projected or pooled", self.features)
