"""The bank operations against their definitions, with properties, gradients, registration checks and wrong versions.

Everything runs twice: with the portable operations, and with whatever implementation of its own this machine's CPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pairclip_fast.kernels import cpp, ops, portable, reference, registration
from pairclip_fast.kernels.choice import VARIABLE

SCALE = torch.tensor(11.0)


@pytest.fixture(scope="module", params=["torch", "cpp"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    missing = cpp.why_not(torch.device("cpu"), dtype=torch.float32, dim=8) if name == "cpp" else None
    if missing:
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        yield name


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, a bank with repeated rows, their groups, targets; entries are few small integers, so scores tie exactly."""
    batch, captions, dim = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = torch.randint(0, draw(st.integers(1, captions)), (captions,), generator=generator)
    bank = torch.randint(-2, 3, (captions, dim), generator=generator).float()[kinds]
    groups = kinds if draw(st.booleans()) else torch.arange(captions)
    emb = torch.randint(-2, 3, (batch, dim), generator=generator).float()
    return emb, bank, groups, torch.randint(0, captions, (batch,), generator=generator)


@pytest.fixture(params=[None, 64, 4096], ids=["default", "tiny", "small"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers whatever the blocks are."""
    if request.param is not None:
        monkeypatch.setattr(portable, "WORKSPACE_BYTES", request.param)
        monkeypatch.setattr(portable, "ROWS", 3)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("batch", "captions", "dim"), [(1, 1, 1), (5, 37, 7), (8, 100, 16), (0, 9, 4)])
def test_softmax_is_as_exact_as_plain_torch(batch: int, captions: int, dim: int) -> None:
    emb, bank = unit(batch, dim), unit(captions, dim, seed=1)
    lse, mean = ops.bank_softmax(emb, bank, SCALE)
    want_lse, want_mean = reference.bank_softmax(emb.double(), bank.double(), SCALE.double())
    plain_lse, plain_mean = reference.bank_softmax(emb, bank, SCALE)
    for got, want, plain in ((lse, want_lse, plain_lse), (mean, want_mean, plain_mean)):
        assert got.shape == want.shape
        assert error(got, want) <= 2 * error(plain, want) + 1e-6


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_softmax_survives_large_logits(offset: float) -> None:
    """All logits far from zero: an implementation that subtracts no maximum, or starts it at 0, gives inf or 0."""
    emb, bank = torch.full((2, 1), 1.0), torch.tensor([[offset], [offset + 1.0], [offset + 2.0]])
    lse, mean = ops.bank_softmax(emb, bank, torch.tensor(1.0))
    want_lse, want_mean = reference.bank_softmax(emb.double(), bank.double(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(lse.double(), want_lse)
    torch.testing.assert_close(mean.double(), want_mean)


@pytest.mark.usefixtures("workspace")
def test_softmax_gradients() -> None:
    emb, scale = unit(4, 6, dtype=torch.float64).requires_grad_(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bank = unit(9, 6, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e, s: ops.bank_softmax(e, bank, s)[0], (emb, scale))
    weights = torch.rand(4, dtype=torch.float64)
    got = torch.autograd.grad((ops.bank_softmax(emb, bank, scale)[0] * weights).sum(), (emb, scale))
    want = torch.autograd.grad((reference.bank_softmax(emb, bank, scale)[0] * weights).sum(), (emb, scale))
    torch.testing.assert_close(got, want)


def test_softmax_never_gives_a_silently_wrong_gradient() -> None:
    emb, bank = unit(3, 4).requires_grad_(), unit(5, 4, seed=1)
    lse, mean = ops.bank_softmax(emb, bank, SCALE)
    assert not mean.requires_grad
    (grad,) = torch.autograd.grad(lse.sum(), emb, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), emb)
    with pytest.raises(ValueError, match="frozen"):
        ops.bank_softmax(emb, bank.requires_grad_(), SCALE)


@pytest.mark.usefixtures("workspace")
def test_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "DOTTED_ROWS", 3)  # four rows: the last part is not full
    emb, scale = unit(4, 6, dtype=torch.float64).requires_grad_(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bank, weights = unit(9, 6, seed=1, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    weights /= weights.sum(dim=1, keepdim=True)
    rows = ops.bank_cross_entropy(emb, bank, scale, weights @ bank)
    want = F.cross_entropy(scale * emb @ bank.T, weights, reduction="none")
    torch.testing.assert_close(rows, want)
    importance = torch.rand(4, dtype=torch.float64)
    got_grads, want_grads = (torch.autograd.grad((loss * importance).sum(), (emb, scale)) for loss in (rows, want))
    torch.testing.assert_close(got_grads, want_grads)
    with pytest.raises(ValueError, match="frozen"):
        ops.bank_cross_entropy(emb, bank, scale, (weights @ bank).requires_grad_())
    with pytest.raises(ValueError, match="target"):
        ops.bank_cross_entropy(emb, bank, scale, (weights @ bank).to("meta"))


@given(problems())
def test_stats_equal_the_definition(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    emb, bank, groups, targets = problem
    got = ops.bank_stats(emb, bank, SCALE, targets, groups=groups)
    want = reference.bank_stats(emb, bank, SCALE, targets, groups)
    torch.testing.assert_close(got.lse, want[0])
    assert torch.equal(got.positive, want[1])
    assert torch.equal(got.greater, want[2])
    assert torch.equal(got.equal, want[3])


@given(problems(), st.integers(0, 2**31))
def test_stats_do_not_depend_on_the_order_of_captions(problem: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> None:
    emb, bank, groups, targets = problem
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    got = ops.bank_stats(emb, bank[order], SCALE, place[targets], groups=groups[order])
    want = ops.bank_stats(emb, bank, SCALE, targets, groups=groups)
    assert torch.equal(got.greater, want.greater)
    assert torch.equal(got.equal, want.equal)


@given(problems(), st.integers(0, 11))
def test_a_repeated_competitor_counts_once_more(problem: tuple[Tensor, Tensor, Tensor, Tensor], row: int) -> None:
    emb, bank, _, targets = problem
    row %= len(bank)
    before = ops.bank_stats(emb, bank, SCALE, targets)
    after = ops.bank_stats(emb, torch.cat([bank, bank[row : row + 1]]), SCALE, targets)
    added = (after.greater - before.greater) + (after.equal - before.equal)
    scores = reference.pair_scores(emb, bank, torch.stack([torch.full_like(targets, row), targets], dim=1))
    assert torch.equal(added, (scores[:, 0] >= scores[:, 1]).int())


def test_identical_captions_never_compete() -> None:
    emb, bank = unit(4, 8), unit(6, 8, seed=1)[torch.tensor([0, 0, 1, 2, 2, 2])]
    groups, targets = torch.tensor([0, 0, 2, 3, 3, 3]), torch.tensor([1, 2, 4, 5])
    grouped = ops.bank_stats(emb, bank, SCALE, targets, groups=groups)
    assert grouped.equal.tolist() == [0, 0, 0, 0]
    assert ops.bank_stats(emb, bank, SCALE, targets).equal.tolist() == [1, 0, 2, 2]


def test_a_constant_embedding_is_the_worst_not_the_best() -> None:
    stats = ops.bank_stats(torch.zeros(3, 4), unit(7, 4), SCALE, torch.tensor([0, 3, 6]))
    assert (stats.greater + stats.equal).tolist() == [6, 6, 6]


def test_nan_is_the_worst_rank() -> None:
    emb = unit(3, 4)
    emb[1, 2] = torch.nan
    stats = ops.bank_stats(emb, unit(7, 4, seed=1), SCALE, torch.tensor([0, 3, 6]))
    assert stats.greater[1] == 7
    assert torch.isnan(stats.lse).tolist() == [False, True, False]
    torch.testing.assert_close(stats.greater, reference.bank_stats(emb, unit(7, 4, seed=1), SCALE, torch.tensor([0, 3, 6]))[2])


@given(problems(), st.data())
def test_topk_is_a_stable_sort(problem: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    emb, bank, _, _ = problem
    k = data.draw(st.integers(1, len(bank)))
    scores, indices = ops.bank_topk(emb, bank, k=k)
    want_scores, want_indices = reference.bank_topk(emb, bank, k)
    assert torch.equal(scores, want_scores)
    assert torch.equal(indices, want_indices)


def test_plain_torch_topk_would_not_do() -> None:
    """The control: with ties, torch.topk alone breaks the order rule, which is why the operation exists."""
    emb, bank = torch.ones(64, 1), torch.ones(300, 1)
    assert not torch.equal(torch.topk(emb @ bank.T, 5).indices, reference.bank_topk(emb, bank, 5)[1])
    assert torch.equal(ops.bank_topk(emb, bank, k=5)[1], reference.bank_topk(emb, bank, 5)[1])


@pytest.mark.usefixtures("workspace")
def test_topk_and_pairs_on_ordinary_features() -> None:
    emb, bank = unit(7, 16), unit(50, 16, seed=1)
    scores, indices = ops.bank_topk(emb, bank, k=10)
    assert torch.equal(indices, reference.bank_topk(emb.double(), bank.double(), 10)[1])
    torch.testing.assert_close(ops.pair_scores(emb, bank, indices), scores)
    gaps = indices.clone()
    gaps[:, 3] = -1
    assert torch.isinf(ops.pair_scores(emb, bank, gaps)[:, 3]).all()


def test_low_precision_inputs_are_scored_in_float32() -> None:
    emb, bank = unit(5, 32).bfloat16(), unit(200, 32, seed=1).bfloat16()
    lse, mean = ops.bank_softmax(emb, bank, SCALE)
    want = reference.bank_softmax(emb.double(), bank.double(), SCALE.double())
    assert lse.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want[0], atol=1e-5, rtol=1e-5)
    stats = ops.bank_stats(emb, bank, SCALE, torch.arange(5))
    assert torch.equal(stats.greater, reference.bank_stats(emb.double(), bank.double(), SCALE.double(), torch.arange(5))[2])


def test_ranks_are_never_made_from_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = portable.bank_topk

    def watched(*arguments: object) -> tuple[Tensor, Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setenv("PAIRCLIP_BACKEND", "torch")
    monkeypatch.setattr(portable, "bank_topk", watched)
    torch.set_float32_matmul_precision("high")
    try:
        ops.bank_topk(unit(2, 4), unit(5, 4, seed=1), k=2)
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torchs_newer_precision_switches_are_respected() -> None:
    """The older one cannot be read once they are set."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        ops.bank_topk(unit(2, 4), unit(5, 4, seed=1), k=2)
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_does_not_round_scores() -> None:
    emb, bank = unit(5, 32), unit(200, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = (*ops.bank_softmax(emb, bank, SCALE), *ops.bank_topk(emb, bank, k=3), ops.pair_scores(emb, bank, torch.arange(5)[:, None]))
    outside = (*ops.bank_softmax(emb, bank, SCALE), *ops.bank_topk(emb, bank, k=3), ops.pair_scores(emb, bank, torch.arange(5)[:, None]))
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda e, b: ops.bank_softmax(e[:, :2], b, SCALE),
        lambda e, b: ops.bank_softmax(e.double(), b, SCALE),
        lambda e, b: ops.bank_softmax(e.to("meta"), b, SCALE),
        lambda e, b: ops.bank_softmax(e, b[:0], SCALE),
        lambda e, b: ops.bank_softmax(e, b, torch.tensor(torch.inf)),
        lambda e, b: ops.bank_topk(e, b, k=0),
        lambda e, b: ops.bank_topk(e, b, k=6),
        lambda e, b: ops.bank_stats(e, b, SCALE, torch.tensor([0, 1, 5])),
        lambda e, b: ops.bank_stats(e, b, SCALE, torch.tensor([0, -1, 4])),
        lambda e, b: ops.bank_stats(e, b, SCALE, torch.tensor([0, 1, 2]), groups=torch.arange(5, device="meta")[:4]),
        lambda e, b: ops.pair_scores(e, b, torch.tensor([[5], [0], [0]])),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[Tensor, Tensor], object]) -> None:
    """ValueError of ours, or the annotation check that the tests install in front of it."""
    with pytest.raises(Exception, match=r"expected|annotation|type-check") as caught:
        call(unit(3, 4), unit(5, 4, seed=1))
    assert isinstance(caught.value, ValueError | TypeError) or "jaxtyping" in type(caught.value).__module__


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck itself reads it
def test_registration() -> None:
    emb, bank, targets = unit(3, 4).requires_grad_(), unit(5, 4, seed=1), torch.tensor([0, 1, 4])
    torch.library.opcheck(torch.ops.pairclip.bank_softmax, (emb, bank, SCALE.clone().requires_grad_()))
    torch.library.opcheck(torch.ops.pairclip.bank_cross_entropy, (emb, bank, SCALE.clone().requires_grad_(), bank[targets]))
    emb = emb.detach()
    torch.library.opcheck(torch.ops.pairclip.bank_stats, (emb, bank, SCALE, targets, torch.arange(5) // 2))
    torch.library.opcheck(torch.ops.pairclip.bank_stats, (emb, bank, SCALE, targets, None))
    torch.library.opcheck(torch.ops.pairclip.pair_scores, (emb, bank, targets[:, None]))
    torch.library.opcheck(torch.ops.pairclip.bank_topk, (emb, bank, 2))


def test_training_costs_two_products_not_three() -> None:
    emb, bank = torch.empty(4, 8, device="meta", requires_grad=True), torch.empty(100, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        ops.bank_softmax(emb, bank, torch.ones((), device="meta"))[0].sum().backward()
    assert counter.get_total_flops() == 4 * 4 * 100 * 8


def test_scores_stay_within_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of scores is larger than the workspace; the whole matrix here would be 25 times as large."""
    monkeypatch.setattr(portable, "WORKSPACE_BYTES", 64 * 1024)
    sizes: list[int] = []
    product = torch.mm

    def watched(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        result = product(a, b, **options)
        sizes.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(torch, "mm", watched)
    emb, bank = unit(200, 8), unit(2_000, 8, seed=1)
    portable.bank_softmax(emb, bank, SCALE)
    portable.bank_topk(emb, bank, 3)
    portable.bank_stats(emb, bank, SCALE, torch.arange(200), None)
    assert max(sizes) <= 64 * 1024


def test_the_implementation_is_named_with_its_reason(backend: str) -> None:
    found = ops.implementation(torch.device("cpu"), dtype=torch.float32, dim=64)
    assert found.name == backend
    assert ("C++" if backend == "cpp" else VARIABLE) in found.reason


def test_an_infinite_score_has_an_infinite_log_sum_exp() -> None:
    emb, bank = torch.tensor([[1.0, 2.0]]), torch.tensor([[torch.inf, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for found in (portable.bank_softmax(emb, bank, SCALE)[0], ops.bank_softmax(emb, bank, SCALE)[0]):
        assert found.item() == reference.bank_softmax(emb, bank, SCALE)[0].item() == torch.inf
