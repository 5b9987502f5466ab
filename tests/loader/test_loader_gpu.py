"""The same stream on a real GPU: run where there is one, counted as skipped elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.loader import make_loader
from pairclip_fast.events import EventLog

dali = pytest.importorskip("pairclip_fast.data.backends.dali")
STD = torch.tensor((60.0, 61.0, 65.0)).view(3, 1, 1)
FULL = AugmentConfig(rotate_degrees=10.0, brightness=0.2, contrast=0.2, saturation=0.2, flip_probability=0.5, shift_pixels=2)
AUGMENTS = {
    "nothing": None,
    "flip and shift": AugmentConfig(flip_probability=0.5, shift_pixels=3),
    "everything": FULL,
    "mirrored, cut, paired anew": dataclasses.replace(FULL, border="reflect", cutout_size=8, pairing="resampled", swap_probability=0.5),
    "mixed": dataclasses.replace(FULL, mix="cutmix", mix_probability=0.5, alternating_flip=True),
}
BACKENDS = {"reference": "resident", "dali": "dali", "native": "native"}
"""What they are called on a GPU."""


def tolerance(backend: str, encoding: str) -> float:
    """In units of the 0..255 scale (design, section 3.4)."""
    return dali.TOLERANCE[encoding] if backend == "dali" else 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_gpu_stream_equals_the_cpu_reference(augment: str, encoding: str, backend: str, folders: dict[str, Path], events: EventLog) -> None:
    loaders = [
        make_loader(
            folders[encoding],
            split="train",
            batch_size=16,
            augment=AUGMENTS[augment],
            seed=5,
            device=torch.device(device),
            events=events,
            backend=name,
            drop_last=False,
        )
        for name, device in (("reference", "cpu"), (backend, "cuda"))
    ]
    assert [loader.backend for loader in loaders] == ["reference", BACKENDS[backend]]
    assert events.fallbacks == []
    for _ in range(2):
        for cpu, gpu in zip(*loaders, strict=True):
            assert gpu.images.device.type == "cuda"
            assert torch.equal(cpu.sample_ids, gpu.sample_ids.cpu())
            assert torch.equal(cpu.valid, gpu.valid.cpu())
            assert torch.equal(cpu.caption_ids, gpu.caption_ids.cpu())
            if cpu.mix_weight is not None:
                assert gpu.mix_weight is not None
                assert torch.equal(cpu.mix_weight, gpu.mix_weight.cpu())
            assert ((cpu.images - gpu.images.cpu()).abs() * STD).max() < tolerance(backend, encoding)
    for loader in loaders:
        loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_loader_of_the_second_gpu_leaves_the_first_alone(backend: str, folders: dict[str, Path], events: EventLog) -> None:
    """Its thread starts on the first one, as every thread does."""
    torch.cuda.set_device(1)
    free = torch.cuda.mem_get_info(0)[0]
    settings = {"split": "train", "batch_size": 16, "augment": FULL, "seed": 5, "events": events, "backend": backend}
    loader = make_loader(folders["raw"], device=torch.device("cuda", 1), **settings)  # type: ignore[arg-type]
    assert {batch.images.device for batch in loader} == {torch.device("cuda", 1)}
    loader.close()
    assert torch.cuda.mem_get_info(0)[0] >= free - 2**20
    torch.cuda.set_device(0)
