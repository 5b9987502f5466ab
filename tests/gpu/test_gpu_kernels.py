"""The bank operations on a real CUDA device against float64, through the registered ops. Skipped, and counted, without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.kernels import ops, reference, tiles
from pairclip_fast.kernels.selfcheck import SCORE_TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # the first use of a shape compiles
CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = [(300, 10_003, 512), (64, 5_000, 768), (256, 10_000, 198), (4_096, 10_000, 512)]
SIZES = [(1, 1, 64), (65, 4_500, 512), (33, 9_000, 48), *LARGE]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def features(batch: int, captions: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    emb, bank = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(CUDA, dtype) for rows in (batch, captions))
    return emb, bank, torch.tensor(20.0, device=CUDA)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max())


def test_our_kernels_are_what_runs() -> None:
    found = ops.implementation(CUDA, dtype=torch.float32, dim=198)
    wanted = "triton" if torch.cuda.get_device_capability(CUDA) >= tiles.OLDEST_CAPABILITY else "torch"
    assert found.name == wanted, found.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "captions", "dim"), SIZES)
def test_softmax_and_its_gradient(batch: int, captions: int, dim: int, dtype: torch.dtype) -> None:
    emb, bank, scale = features(batch, captions, dim, dtype)
    emb.requires_grad_()
    lse, mean = ops.bank_softmax(emb, bank, scale)
    (grad,) = torch.autograd.grad(lse.sum(), emb)
    want_lse, want_mean = reference.bank_softmax(emb.detach().double(), bank.double(), scale.double())
    plain_lse, plain_mean = reference.bank_softmax(emb.detach().float(), bank.float(), scale)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * float(bank.abs().max())
    assert error(lse, want_lse) <= 2 * error(plain_lse, want_lse) + 1e-5
    assert error(mean, want_mean) <= 2 * error(plain_mean, want_mean) + rounding + 1e-6
    assert error(grad, scale * mean) <= torch.finfo(dtype).eps * float(scale * mean.abs().max())
    again = ops.bank_softmax(emb, bank, scale)
    assert torch.equal(lse, again[0]), "the same bits every time"
    assert torch.equal(mean, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "captions", "dim"), SIZES)
def test_ranks_and_lists_with_ties(batch: int, captions: int, dim: int, dtype: torch.dtype) -> None:
    """Small integers: every score is exact on any hardware, ties are by the hundred, and the answer has to be equal."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, captions, (captions,), generator=generator)
    bank = torch.randint(-1, 2, (captions, dim), generator=generator).float()[groups].to(CUDA, dtype)
    emb = torch.randint(-1, 2, (batch, dim), generator=generator).to(CUDA, dtype)
    targets, scale = (torch.arange(batch) % captions).to(CUDA), torch.tensor(0.5, device=CUDA)
    for given in (groups.to(CUDA), None):
        got = ops.bank_stats(emb, bank, scale, targets, groups=given)
        want = reference.bank_stats(emb.double(), bank.double(), scale.double(), targets, given)
        assert torch.equal(got.positive, want[1].float())
        assert torch.equal(got.greater, want[2])
        assert torch.equal(got.equal, want[3])
    for k in {1, min(10, captions), min(100, captions)}:
        scores, indices = ops.bank_topk(emb, bank, k=k)
        want_scores, want_indices = reference.bank_topk(emb.double(), bank.double(), k)
        assert torch.equal(scores, want_scores.float())
        assert torch.equal(indices, want_indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_float32_grade(dtype: torch.dtype) -> None:
    emb, bank, _scale = features(300, 10_003, 512, dtype)
    exact = emb.double() @ bank.double().T
    scores, indices = ops.bank_topk(emb, bank, k=100)
    assert error(scores, exact.gather(1, indices)) <= SCORE_TOLERANCE
    assert error(scores, exact.topk(100, dim=1).values) <= SCORE_TOLERANCE
    assert error(ops.pair_scores(emb, bank, indices), scores) <= SCORE_TOLERANCE


def test_nan_rows_rank_last_and_sort_first() -> None:
    emb, bank, scale = features(70, 6_000, 512, torch.bfloat16)
    emb[3, 7] = torch.nan
    got = ops.bank_stats(emb, bank, scale, torch.arange(70, device=CUDA))
    assert got.greater[3] == 6_000
    assert got.lse.isnan().nonzero().flatten().tolist() == [3]
    assert ops.bank_topk(emb, bank, k=2)[1][3].tolist() == [0, 1]


def test_no_rows_no_results() -> None:
    """Nothing is launched, whatever the size of the bank; the evaluation asks for this."""
    emb, bank, scale = features(0, 10_000, 198, torch.float32)
    assert ops.bank_topk(emb, bank, k=5)[1].shape == (0, 5)
    assert ops.bank_softmax(emb, bank, scale)[1].shape == (0, 198)
    assert ops.bank_stats(emb, bank, scale, torch.zeros(0, dtype=torch.int64, device=CUDA)).lse.shape == (0,)
