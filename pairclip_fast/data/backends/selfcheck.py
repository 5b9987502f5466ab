"""Whether a backend that nobody could run on the GPU it now meets makes the pictures that torch makes.

A few pictures, made once when the loader is opened: an error or another picture costs one event with the reason, not the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.parameters import Draw, own_tiles
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import one_line

SAMPLES, DIFFERENT = 16, 2
EPOCHS = (0, 3)
Fill = Callable[[Draw], Tensor]


def why_not(
    fill: Fill, *, like: Fill, reader: ShardReader, augment: AugmentConfig | None, moves: bool, tolerance: float, samples: int
) -> str | None:
    """Why `fill` cannot be used; None if it makes the pictures that `like` makes.

    Args:
        fill: From a draw to normalised pictures; any exception is a reason.
        like: What they should be.
        reader: The split; its first samples that can be read are made with the parameters of others.
        augment: Ranges of the augmentation.
        moves: Tiles may change their places.
        tolerance: In units of the 0..255 scale.
        samples: At most so many at a time.
    """
    tiles, height, width, _ = reader.tile_shape
    count, read = min(SAMPLES, samples), readable(reader)
    if not len(read):
        return None  # told when a sample is asked for
    sources = own_tiles(read[np.arange(count) % len(read)], tiles=tiles)
    if moves:
        sources = sources[:, ::-1].copy()
    std = torch.tensor(reader.manifest.std).view(3, 1, 1)
    try:
        for epoch in EPOCHS:
            draw = Draw(ids=np.arange(count), sources=sources, tile_size=(height, width), seed=epoch << 40, epoch=epoch, augment=augment)
            worst = float(((fill(draw).cpu() - like(draw).cpu()) * std).abs().max())
            if not worst <= tolerance:  # NaN is not
                return f"it makes other pictures than torch ({worst:.3g} of 255 apart)"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything; what is no fault of theirs comes back in torch
        return one_line(error)
    return None


def readable(reader: ShardReader) -> NDArray[np.int64]:
    """The first few samples that are not damaged, at most `DIFFERENT`."""
    found: list[int] = []
    for sample_id in range(min(len(reader), SAMPLES)):
        with contextlib.suppress(BadRecordError):
            reader.tiles(sample_id)
            found.append(sample_id)
        if len(found) == DIFFERENT:
            break
    return np.array(found, dtype=np.int64)
