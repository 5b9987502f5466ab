"""The way to the Triton kernels without a GPU: who may run, what the self-check lets pass, and the tables of tiles."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.kernels import choice, ops, portable, tiles, triton_cuda

CPU = torch.device("cpu")
OPERATIONS = ("bank_softmax", "bank_stats", "pair_scores", "bank_topk")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The CPU as a GPU whose kernels are torch's operations; one of them may be replaced by a broken one."""

    def install(**broken: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        monkeypatch.setitem(choice.CANDIDATES, "cpu", ("triton", "pairclip_fast.kernels.triton_cuda"))
        for name in OPERATIONS:
            monkeypatch.setattr(triton_cuda, name, broken.get(name, getattr(portable, name)))

    forget()
    yield install
    forget()


def forget() -> None:
    for cached in (choice._resolve, triton_cuda.failure):
        cached.cache_clear()


def test_what_agrees_with_torch_runs(stand_in: Callable[..., None]) -> None:
    stand_in()
    found = ops.implementation(CPU, dtype=torch.float32, dim=64)
    assert found.name == "triton"
    assert "9.0" in found.reason
    for dtype in triton_cuda.DTYPES:
        assert choice.kernels_for(torch.ones(2, 30, dtype=dtype), torch.ones(3, 30, dtype=dtype)) is triton_cuda


def off_by(name: str, output: int, amount: float) -> Callable[..., Any]:
    def broken(*arguments: Any) -> Any:
        results = getattr(portable, name)(*arguments)
        if isinstance(results, Tensor):
            return results + amount
        return tuple(result + amount if number == output else result for number, result in enumerate(results))

    return broken


class OutOfResources(Exception):  # noqa: N818
    """As Triton's, which is of no class of ours."""


def fail(*_arguments: Any) -> None:
    raise OutOfResources("out of resource: shared memory,\n Required: 262144")


def one_index_off(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, indices = portable.bank_topk(emb, bank, k)
    indices[5, 3] = (indices[5, 3] + 100) % len(bank)
    return scores, indices


def later_of_two_equals_first(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, indices = portable.bank_topk(emb, bank.flip(0), k)
    return scores, len(bank) - 1 - indices


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("bank_softmax", off_by("bank_softmax", 0, 0.01), "log-partition is off"),
        ("bank_softmax", off_by("bank_softmax", 1, torch.nan), "mean is off"),
        ("bank_softmax", fail, "OutOfResources: out of resource: shared memory, Required"),
        ("pair_scores", off_by("pair_scores", 0, 1e-4), "pair_scores's scores is off"),
        ("bank_topk", off_by("bank_topk", 0, 1e-4), "scores is off"),
        ("bank_topk", one_index_off, "indices is off"),
        ("bank_topk", later_of_two_equals_first, "order is off"),
        ("bank_stats", off_by("bank_stats", 0, 0.01), "log-partition is off"),
        ("bank_stats", off_by("bank_stats", 1, 1e-4), "positive is off"),
        ("bank_stats", off_by("bank_stats", 2, 5), "counts is off"),
        ("bank_stats", off_by("bank_stats", 3, 5), "counts is off"),
    ],
)
def test_a_broken_kernel_hands_over_to_torch(stand_in: Callable[..., None], name: str, broken: Callable[..., Any], reason: str) -> None:
    stand_in(**{name: broken})
    with pytest.warns(RuntimeWarning, match=r"64 .*float32.* go to torch"):
        found = ops.implementation(CPU, dtype=torch.float32, dim=64)
    assert found.name == "torch"
    assert re.search(reason, found.reason), found.reason
    assert "\n" not in found.reason
    emb, bank = torch.randn(3, 64), torch.randn(9, 64)
    assert torch.equal(ops.bank_topk(emb, bank, k=2)[1], portable.bank_topk(emb, bank, 2)[1])


def test_another_dtype_or_size_is_checked_when_it_comes(stand_in: Callable[..., None]) -> None:
    """The usual one works; a size that does not is warned about once and then goes to torch."""

    def fails_at_128(emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return fail() if emb.shape[1] == 128 else portable.bank_softmax(emb, bank, scale)  # type: ignore[return-value]

    stand_in(bank_softmax=fails_at_128)
    assert ops.implementation(CPU, dtype=torch.float32, dim=64).name == "triton"
    scale = torch.tensor(1.0)
    with pytest.warns(RuntimeWarning, match=r"128 .*float32.* go to torch: .*OutOfResources"):
        ops.bank_softmax(torch.ones(2, 128), torch.ones(3, 128), scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.bank_softmax(torch.ones(2, 128), torch.ones(3, 128), scale)
        ops.bank_softmax(torch.ones(2, 64), torch.ones(3, 64), scale)


def test_what_is_not_covered(stand_in: Callable[..., None]) -> None:
    stand_in()
    emb, bank = torch.ones(2, 64), torch.ones(3, 64)
    assert triton_cuda.covers(emb, bank)
    assert not triton_cuda.covers(emb.double(), bank.double())
    assert not triton_cuda.covers(torch.ones(2, 0), torch.ones(3, 0))
    assert not triton_cuda.covers(emb, torch.ones(1, 64).expand(2**31, 64)), "more captions than 32 bits count"


def test_old_gpus_and_missing_triton_have_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert triton_cuda.why_not(CPU, dtype=torch.float32, dim=64) == "compute capability 7.5: Triton uses tensor cores from 8.0 on"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert triton_cuda.why_not(CPU, dtype=torch.float32, dim=64) == "triton is not installed"


def test_an_unknown_architecture_says_so_and_gets_the_smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (13, 0))
    assert "without tiles of its own" in triton_cuda.describe(CPU)
    for dtype in triton_cuda.DTYPES:
        unknown, smallest = (tiles.softmax_tile(capability, dtype=dtype, dim=512) for capability in ((13, 0), (8, 6)))
        assert unknown == smallest


def test_importing_the_operations_does_not_import_the_kernels() -> None:
    """torch's FLOP counter imports triton by itself; what must not follow are the kernels and the compiler."""
    code = "import sys, pairclip_fast.kernels.ops, pairclip_fast.kernels.triton_cuda; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "pairclip_fast.kernels.triton_cuda" in loaded
    assert not [name for name in loaded if name.startswith("pairclip_fast.kernels.triton_") and name != "pairclip_fast.kernels.triton_cuda"]


@pytest.mark.parametrize(("dim", "width"), [(1, 64), (37, 64), (64, 64), (198, 256), (512, 512)])
def test_features_get_zeros_behind_them(dim: int, width: int) -> None:
    emb, bank = torch.randn(3, dim), torch.randn(7, dim)
    wide_emb, wide_bank = triton_cuda.widened(emb, bank)
    assert (wide_emb.shape, wide_bank.shape) == ((3, width), (7, width))
    assert torch.equal(wide_emb @ wide_bank.T, F.pad(emb, (0, width - dim)) @ F.pad(bank, (0, width - dim)).T)
    assert (wide_bank is bank) == (dim == width), "what fits is not copied"
    assert triton_cuda.widened(emb, bank)[1] is wide_bank, "made once"
    bank[0, 0] += 1.0
    assert torch.equal(triton_cuda.widened(emb, bank)[1][:, :dim], bank), "a bank that changed is widened again"


def test_the_wider_copy_goes_with_its_bank() -> None:
    bank = torch.randn(7, 40)
    before = len(triton_cuda._widened_banks)
    triton_cuda.widened(torch.randn(3, 40), bank)
    assert len(triton_cuda._widened_banks) == before + 1
    del bank
    assert len(triton_cuda._widened_banks) == before
    with torch.inference_mode():
        assert triton_cuda.widened(torch.randn(3, 40), torch.randn(7, 40))[1].shape == (7, 64)


LAYOUTS = {"apart": torch.ones(64, 3).T, "odd": torch.ones(3 * 64 + 1)[1:].view(3, 64), "same": torch.ones(1, 66).expand(3, 66)[:, 2:]}


@pytest.mark.parametrize("bank", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_in_another_layout_are_copied(bank: Tensor) -> None:
    wide = triton_cuda.widened(torch.ones(2, 64), bank)[1]
    assert torch.equal(wide, bank)
    assert (wide.stride(1), wide.data_ptr() % 16) == (1, 0)


def test_a_gpu_that_the_kernels_broke_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access torch fails too; handing over would only move the error."""

    def broken(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(EnvironmentLackingError, match=r"(?s)left the GPU unusable.*PAIRCLIP_BACKEND=torch"):
        triton_cuda._refuse_a_broken_device(torch.device("cuda", 0), "self-check: RuntimeError")


@pytest.mark.parametrize("captions", [4_500, 20_000, 10**6])
@pytest.mark.parametrize("batch", [0, 1, 64, 4_096])
@pytest.mark.parametrize("k", [1, 100, 1_024])
def test_the_lists_of_the_best_fit_their_workspace(captions: int, batch: int, k: int) -> None:
    pytest.importorskip("triton")
    from pairclip_fast.kernels import triton_topk

    tile, step = tiles.topk_tile(dtype=torch.float32), max(8, -(-captions // 65_536))
    capacity = 2 * step * k + 256
    rows, splits = triton_topk.blocks_of_rows(batch, captions, step=step, capacity=capacity, tile=tile, processors=132)
    assert rows % tile.rows == 0
    assert splits == 1 or splits * capacity <= captions / 2, "lists are shorter than the rows that they stand for"
    taken = rows * (triton_topk.SORT_BYTES * splits * capacity + 4 * -(-captions // step))
    assert taken <= triton_topk.WORKSPACE_BYTES


@pytest.mark.parametrize("captions", [1, 64, 65, 10_000, 10**6])
@pytest.mark.parametrize("programs", [1, 64, 1000])
def test_splits_cover_the_bank(captions: int, programs: int) -> None:
    splits = tiles.split_bank(captions, columns=64, programs=programs, processors=108)
    each, used = tiles.tiles_per_split(captions, columns=64, splits=splits)
    assert 1 <= used <= splits
    assert (used - 1) * each * 64 < captions <= used * each * 64
    assert used == 1 or each >= tiles.LEAST_TILES_PER_SPLIT


def test_kernels_use_no_atomics_and_no_locks() -> None:
    for path in sorted(Path(triton_cuda.__file__).parent.glob("triton_*.py")):
        assert not re.search(r"atomic_|autotune|while ", path.read_text()), path.name


def test_the_ops_can_be_traced_for_cuda() -> None:
    """On a CUDA device that does not exist: shapes, dtypes and devices as the ops promise them, nothing launched."""
    with FakeTensorMode():
        emb, bank = torch.empty(6, 512, device="cuda", dtype=torch.bfloat16), torch.empty(100, 512, device="cuda", dtype=torch.bfloat16)
        scale, targets = torch.empty((), device="cuda"), torch.empty(6, device="cuda", dtype=torch.int64)
        lse, mean = ops.bank_softmax(emb, bank, scale)
        stats = ops.bank_stats(emb, bank, scale, targets, groups=torch.empty(100, device="cuda", dtype=torch.int64))
        scores, indices = ops.bank_topk(emb, bank, k=7)
        pairs = ops.pair_scores(emb, bank, targets[:, None])
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in (lse, mean, *stats, scores, indices, pairs)]
    counts = [((6,), torch.int32)] * 2
    assert found == [
        ((6,), torch.float32), ((6, 512), torch.float32), *[((6,), torch.float32)] * 2, *counts,
        ((6, 7), torch.float32), ((6, 7), torch.int64), ((6, 1), torch.float32),
    ]  # fmt: skip
    assert {tensor.device.type for tensor in (lse, mean, *stats, scores, indices, pairs)} == {"cuda"}
