"""`bank_softmax` in Triton's interpreter: against float64, in every tiling, and against broken copies of itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.kernels import ops, reference, triton_softmax
from pairclip_fast.kernels.tiles import SoftmaxTile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = torch.tensor(23.0)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def tiling(*, depth: int, width: int, rows: int = 16, columns: int = 32) -> SoftmaxTile:
    return SoftmaxTile(rows=rows, columns=columns, depth=depth, slice=width, warps=4, stages=2)


def run(
    emb: Tensor, bank: Tensor, tile: SoftmaxTile, splits: int, scale: Tensor = SCALE, module: ModuleType = triton_softmax
) -> tuple[Tensor, Tensor]:
    lse, mean = module.bank_softmax(emb, bank, scale, tile=tile, splits=splits)
    return lse, mean


def excess(emb: Tensor, bank: Tensor, got: tuple[Tensor, Tensor], scale: Tensor = SCALE) -> tuple[float, float]:
    """By how much `lse` and `mean` miss float64, beyond twice the error of plain float32 torch and the rounding of weights to
    the inputs' dtype before the second product."""
    lse, mean = reference.bank_softmax(emb.double(), bank.double(), scale.double())
    plain_lse, plain_mean = reference.bank_softmax(emb.float(), bank.float(), scale.float())
    weights = torch.softmax(scale.double() * (emb.double() @ bank.double().T), dim=1)
    unit_roundoff = 0.0 if emb.dtype == torch.float32 else torch.finfo(emb.dtype).eps / 2
    allowed = unit_roundoff * (weights @ bank.double().abs()) + 2 * (plain_mean.double() - mean).abs().max() + 1e-6
    lse_error = (got[0].double() - lse).abs().max() - 2 * (plain_lse.double() - lse).abs().max() - 1e-6
    return float(lse_error.nan_to_num(nan=torch.inf)), float(((got[1].double() - mean).abs() - allowed).max().nan_to_num(nan=torch.inf))


@pytest.mark.parametrize(
    ("batch", "captions", "dim", "depth", "width", "splits", "dtypes"),
    [
        (1, 1, 16, 16, 16, 1, DTYPES),  # the smallest there is
        (15, 31, 64, 64, 64, 2, DTYPES),  # rows whole on chip
        (16, 32, 64, 32, 64, 1, DTYPES[:1]),  # exactly one tile
        (17, 33, 64, 16, 32, 2, DTYPES),  # one more of each; two slices
        (64, 65, 48, 16, 64, 3, DTYPES[:1]),  # features are no power of two
        (65, 97, 32, 32, 32, 4, DTYPES[:1]),
        (5, 131, 512, 64, 512, 4, DTYPES[:1]),
        (9, 70, 768, 64, 512, 2, DTYPES[1:2]),  # the second slice is half empty
    ],
)
def test_softmax_is_as_exact_as_plain_torch(
    batch: int, captions: int, dim: int, depth: int, width: int, splits: int, dtypes: list[torch.dtype]
) -> None:
    for dtype in dtypes:
        emb, bank = unit(batch, dim, dtype=dtype), unit(captions, dim, seed=1, dtype=dtype)
        lse, mean = run(emb, bank, tiling(depth=depth, width=width), splits)
        assert (lse.shape, mean.shape) == ((batch,), (batch, dim))
        assert max(excess(emb, bank, (lse, mean))) <= 0.0, dtype


def far_from_zero(offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every logit near `offset`: a maximum that starts at 0, or sees padding as 0, loses the row or overflows."""
    emb = torch.zeros(3, 16)
    emb[:, 0] = 1.0
    bank = torch.zeros(37, 16)
    bank[:, 0] = offset + torch.arange(37) / 8
    return emb, bank, torch.tensor(1.0)


def matches(got: tuple[Tensor, Tensor], emb: Tensor, bank: Tensor, scale: Tensor) -> bool:
    want = reference.bank_softmax(emb.double(), bank.double(), scale.double())
    return all(torch.allclose(a.double(), b, rtol=2e-6, atol=2e-5) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_softmax_survives_large_logits(offset: float, splits: int) -> None:
    emb, bank, scale = far_from_zero(offset)
    assert matches(run(emb, bank, tiling(depth=16, width=16), splits, scale), emb, bank, scale)


@pytest.mark.parametrize("scale", [0.0, -5.0])
def test_scale_may_be_zero_or_negative(scale: float) -> None:
    emb, bank, factor = unit(4, 16), unit(37, 16, seed=1), torch.tensor(scale)
    assert matches(run(emb, bank, tiling(depth=16, width=16), 2, factor), emb, bank, factor)


def test_splits_agree_and_repeat_to_the_bit(shuffled_programs: Callable[[int], None]) -> None:
    emb, bank, tile = unit(17, 32), unit(100, 32, seed=1), tiling(depth=32, width=16)
    first = run(emb, bank, tile, 3)
    assert max(excess(emb, bank, first)) <= 0.0
    shuffled_programs(0)
    again = run(emb, bank, tile, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # numpy's, in the interpreter
def test_a_nan_stays_in_its_row() -> None:
    emb, bank = unit(20, 16), unit(40, 16, seed=1)
    emb[3, 5] = torch.nan
    lse, mean = run(emb, bank, tiling(depth=16, width=16), 2)
    assert lse.isnan().nonzero().squeeze(1).tolist() == [3]
    assert mean.isnan().any(dim=1).nonzero().squeeze(1).tolist() == [3]


def test_rows_may_lie_apart_in_memory() -> None:
    emb, bank = unit(20, 64)[::2, :48], unit(40, 80, seed=1)[:, 16:64]
    assert matches(run(emb, bank, tiling(depth=16, width=64), 1), emb, bank, SCALE)


@pytest.mark.parametrize("capability", [(8, 0), (7, 99)])
def test_the_op_and_its_gradient(pretended_gpu: Callable[[tuple[int, int]], None], capability: tuple[int, int]) -> None:
    """Through the registered op, with the self-check before it; an architecture that is too old falls back with its reason."""
    pretended_gpu(capability)
    found = ops.implementation(torch.device("cpu"), dtype=torch.float32, dim=64)
    assert found.name == ("torch" if capability < (8, 0) else "triton"), found.reason
    assert ("7.99" in found.reason) == (capability < (8, 0))
    emb, scale = unit(5, 64).requires_grad_(), torch.tensor(9.0, requires_grad=True)
    bank, weights = unit(300, 64, seed=1), torch.rand(5, dtype=torch.float64)
    got = torch.autograd.grad((ops.bank_softmax(emb, bank, scale)[0] * weights).sum(), (emb, scale))
    wide, wide_scale = emb.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    want = torch.autograd.grad((reference.bank_softmax(wide, bank.double(), wide_scale)[0] * weights).sum(), (wide, wide_scale))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)


def test_any_number_of_features_and_any_layout(pretended_gpu: Callable[[tuple[int, int]], None]) -> None:
    """Zeros behind the features: the numbers, shapes and strides are those of the narrow ones."""
    pretended_gpu((8, 0))
    emb, bank = unit(5, 40), unit(300, 41, seed=1)[:, 1:]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        lse, mean = ops.bank_softmax(emb.to(dtype), bank.to(dtype), SCALE)
        want = reference.bank_softmax(emb.to(dtype).double(), bank.to(dtype).double(), SCALE.double())
        torch.testing.assert_close(lse.double(), want[0], atol=10 * tolerance, rtol=tolerance)
        torch.testing.assert_close(mean.double(), want[1], atol=tolerance, rtol=tolerance)
        assert (mean.shape, mean.is_contiguous()) == ((5, 40), True)
    targets = torch.arange(5)
    stats = ops.bank_stats(emb, bank, SCALE, targets)
    assert torch.equal(stats.greater, reference.bank_stats(emb.double(), bank.double(), SCALE.double(), targets, None)[2])
    assert torch.equal(ops.bank_topk(emb, bank, k=3)[1], reference.bank_topk(emb.double(), bank.double(), 3)[1])
    chosen = torch.tensor([[0, -1], [1, 299], [2, 2], [3, 5], [4, 0]])
    torch.testing.assert_close(ops.pair_scores(emb, bank, chosen), reference.pair_scores(emb, bank, chosen))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("shrink", "shrink", id="control: nothing is broken"),
        pytest.param('scores * scale2, float("-inf"))', "scores * scale2, 0.0)", id="padding enters the maximum as 0"),
        pytest.param("(column < captions)[None, :], scores", "(column < captions + 1)[None, :], scores", id="one column too many"),
        pytest.param("mean = mean * shrink[:, None]", "mean = mean", id="the mean is not rescaled"),
        pytest.param("total = total * shrink +", "total = total +", id="the sum is not rescaled"),
        pytest.param("weighted / whole[:, None]", "weighted", id="the mean is not normalised"),
        pytest.param("weighted += share[:, None] *", "weighted += ", id="means of splits weigh the same"),
        pytest.param("whole += share *", "whole += ", id="sums of splits weigh the same"),
        pytest.param("tl.range(0, splits)", "tl.range(1, splits)", id="a split is lost"),
        pytest.param("first = split * tiles_per_split", "first = split * (tiles_per_split - 1)", id="splits overlap"),
        pytest.param("tl.program_id(2) * SLICE", "0 * SLICE", id="every slice is the first"),
        pytest.param("row = tl.program_id(0) * ROWS", "row = tl.program_id(0) * (ROWS - 1)", id="blocks of rows overlap"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_kernels_are_caught(mutated: Callable[[str, str, str], ModuleType], old: str, new: str) -> None:
    assert softmax_is_right(mutated("triton_softmax", old, new)) == (old == new)


def softmax_is_right(module: ModuleType) -> bool:
    emb, bank = unit(17, 32), unit(70, 32, seed=1)
    if max(excess(emb, bank, run(emb, bank, tiling(depth=16, width=16), 2, module=module))) > 0.0:
        return False
    emb, bank, scale = far_from_zero(-3000.0)
    return matches(run(emb, bank, tiling(depth=16, width=16), 1, scale, module=module), emb, bank, scale)
