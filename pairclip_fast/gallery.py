"""The pictures an evaluation keeps for the report: about half hits, half misses, and where the encoder looked.

Candidates are the first ones of each kind that come along (pairs are drawn at random, so the first are as good as any);
at most twice the gallery's size is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

GALLERY_SIZE = 24


class Gallery:
    """Collects normalised pictures during an evaluation.

    Args:
        size: Pictures to end with; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[bool, list[tuple[int, Tensor]]] = {True: [], False: []}

    def offer(
        self,
        images: Float[Tensor, "batch 3 height width"],
        valid: Bool[Tensor, " batch"],
        *,
        ranks: Int[np.ndarray, " pairs"],
        sample_ids: Int[np.ndarray, " pairs"],
    ) -> None:
        """Look at a batch; `ranks` and `sample_ids` are those of its valid rows."""
        if all(len(kept) >= self.size for kept in self._kept.values()):
            return
        positions = valid.nonzero().squeeze(1).tolist()
        for position, rank, sample_id in zip(positions, ranks.tolist(), sample_ids.tolist(), strict=True):
            kept = self._kept[rank == 1]
            if len(kept) < self.size:
                kept.append((sample_id, images[position].float().clone()))

    def chosen(self) -> list[tuple[int, Tensor]]:
        """Half of each kind, or more of one where the other has too few; hits first."""
        hits, misses = self._kept[True], self._kept[False]
        num_hits = min(len(hits), max(self.size // 2, self.size - len(misses)))
        return hits[:num_hits] + misses[: self.size - num_hits]

    def arrays(
        self, model: nn.Module, *, sample_ids: Int[np.ndarray, " pairs"], mean: Sequence[float], std: Sequence[float]
    ) -> dict[str, np.ndarray]:
        """`gallery_images`, `gallery_index` (positions in `sample_ids`, which is ascending) and `attention` where the encoder has any.

        `attention` is float32 [pictures, layers, rows, columns] on the token grid of the stacked picture.
        """
        chosen = self.chosen()
        if not chosen:
            return {}
        images = torch.stack([image for _, image in chosen])
        arrays = {
            "gallery_images": denormalise(images, mean=mean, std=std),
            "gallery_index": np.searchsorted(sample_ids, np.array([sample_id for sample_id, _ in chosen])),
        }
        attention = getattr(model, "attention_pictures", lambda _images: None)(images)
        if attention is not None:
            arrays["attention"] = attention.float().cpu().numpy()
        return arrays


def denormalise(
    images: Float[Tensor, "batch 3 height width"], *, mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Pictures from normalised images; `mean` and `std` per channel in 0..255 units."""
    shift, factor = (images.new_tensor(list(values)).view(1, 3, 1, 1) for values in (mean, std))
    pictures = (images * factor + shift).round().clamp(0, 255).to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
