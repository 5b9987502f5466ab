"""Every backend under one name, and how its batches are compared; "twin" is the native one without the C++ extension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import loader as loader_module
from pairclip_fast.data.loader import Batch, Loader, make_loader
from pairclip_fast.native import Native, native

CPU = torch.device("cpu")
MEAN = torch.tensor((125.0, 120.0, 110.0)).view(3, 1, 1)
STD = torch.tensor((60.0, 61.0, 65.0)).view(3, 1, 1)
FULL = AugmentConfig(rotate_degrees=10.0, brightness=0.2, contrast=0.2, saturation=0.2, flip_probability=0.5, shift_pixels=2)
FAST = AugmentConfig(flip_probability=0.5, shift_pixels=3)
BACKENDS = ("native", "twin", "reference", "dali")
Open = Callable[..., Loader]


def skip_if_absent(backend: str) -> None:
    if backend == "dali" and not loader_module.dali_installed():
        pytest.skip("DALI is not installed")
    if backend == "native" and native().module is None:
        pytest.skip(native().reason)


def make_named_loader(folder: Path, *, backend: str, **options: Any) -> Loader:
    """`make_loader`; "twin" is the native backend as it is without the C++ extension."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "twin":
            patch.setattr(loader_module, "native", lambda: Native(None, "switched off in this test"))
        return make_loader(folder, backend="native" if backend == "twin" else backend, **options)


def by_id(loader: Loader) -> dict[int, torch.Tensor]:
    """One epoch: sample id -> picture. Each id must come once."""
    pictures: dict[int, torch.Tensor] = {}
    for batch in loader:
        for sample_id, picture, valid in zip(batch.sample_ids.tolist(), batch.images, batch.valid.tolist(), strict=True):
            if valid:
                assert sample_id not in pictures
                pictures[sample_id] = picture
    return pictures


def assert_same(first: Batch, second: Batch, *, tolerance: float = 0.0) -> None:
    """`tolerance` in units of the 0..255 scale."""
    assert (first.epoch, first.step) == (second.epoch, second.step)
    for name in ("sample_ids", "caption_ids", "valid"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert ((first.images - second.images).abs() * STD).max() <= tolerance


def endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader
