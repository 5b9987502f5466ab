"""The estimates: hand-calculated values, and what any bound must obey."""

from __future__ import annotations

import pytest
import torch

from pairclip_fast.gpus import GPUS, Gpu, find_gpu
from pairclip_fast.kernels import roofline
from pairclip_fast.kernels.roofline import Operation, bound

SIZES = {"batch": 4096, "captions": 10_000, "dim": 512}
A100 = next(gpu for gpu in GPUS if gpu.name == "A100")
OURS = [gpu for gpu in GPUS if gpu.tf32_tflops is not None]


def test_a_value_by_hand() -> None:
    """4 * 4096 * 10,000 * 512 = 83.9 GFLOP at 312 TFLOP/s are 0.269 ms."""
    found = bound(A100, "bank_softmax", dtype=torch.bfloat16, **SIZES)
    assert found.flops == 4 * 4096 * 10_000 * 512
    assert found.milliseconds == pytest.approx(0.2689, rel=1e-3)
    assert found.limited_by == "products"
    assert bound(A100, "bank_stats", dtype=torch.bfloat16, **SIZES).milliseconds == pytest.approx(0.1344, rel=1e-3)


def test_slices_and_three_products_are_counted() -> None:
    """float32 on 512 features: four slices, each with its own scores, and three TF32 products for one."""
    assert bound(A100, "bank_softmax", dtype=torch.float32, **SIZES).flops == 3 * 5 * 2 * 4096 * 10_000 * 512


def test_few_rows_wait_for_the_memory() -> None:
    found = bound(A100, "bank_stats", batch=1, captions=10**6, dim=512, dtype=torch.bfloat16)
    assert found.limited_by == "memory"
    assert found.milliseconds == pytest.approx(1e3 * 1_000_001 * 1024 / 2.039e12, rel=1e-3)
    assert bound(A100, "pair_scores", dtype=torch.bfloat16, chosen=2, **SIZES).limited_by == "memory"


@pytest.mark.parametrize("gpu", OURS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("operation", ["bank_softmax", "bank_stats", "pair_scores", "bank_topk"])
def test_more_work_is_never_faster(gpu: Gpu, operation: Operation) -> None:
    small = bound(gpu, operation, dtype=torch.bfloat16, **SIZES).milliseconds
    for larger in ({"batch": 8192}, {"captions": 20_000}, {"dim": 1024}):
        assert bound(gpu, operation, dtype=torch.bfloat16, **(SIZES | larger)).milliseconds >= small
    assert bound(gpu, operation, dtype=torch.float32, **SIZES).milliseconds >= small


def test_the_workspace_stops_growing_with_the_bank() -> None:
    sizes = [
        roofline.softmax_workspace_bytes(A100, batch=4096, captions=captions, dim=512, dtype=torch.bfloat16)
        for captions in (10**4, 10**5, 10**7)
    ]
    assert sizes[0] == sizes[1] == sizes[2] == 4 * 4 * 4096 * 514
    assert sizes[0] <= 48 * 2**20


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", None),
        ("Tesla T4", None),
    ],
)
def test_device_names(name: str, found: str | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == found
