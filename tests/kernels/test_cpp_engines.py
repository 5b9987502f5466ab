"""Every engine of the C++ kernels that runs here, tiles in software included, against float64 and against deliberate faults.

The rule for values: an error at most twice that of plain torch in the same dtype, plus 1e-6. A check is a function of an
implementation, so that the wrong implementations at the end can be shown to fail it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.kernels import cpp, reference
from pairclip_fast.native import native

ENGINES: list[str] = native().module.kernels.engines() if native().module else []
REQUIRED = pytest.mark.skipif(not ENGINES, reason=native().reason)
SHAPES = [(1, 1, 1), (5, 37, 7), (14, 128, 32), (33, 300, 200), (15, 257, 33), (64, 129, 100)]
pytestmark = REQUIRED


class Engine:
    """One engine as an implementation of the bank operations."""

    def __init__(self, name: str) -> None:
        self.name = name

    def bank_softmax(self, emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return cpp.bank_softmax(emb, bank, scale, engine=self.name)

    def bank_stats(self, emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
        return cpp.bank_stats(emb, bank, scale, targets, groups, engine=self.name)

    def pair_scores(self, emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
        return cpp.pair_scores(emb, bank, indices, engine=self.name)

    def bank_topk(self, emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return cpp.bank_topk(emb, bank, k, engine=self.name)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def unit(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def integers(*shape: int, seed: int, most: int = 2) -> Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def assert_as_exact(got: Tensor, want: Tensor, plain: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    error, allowed = ((x.double() - want).abs().max().item() for x in (got, plain))
    assert error <= 2 * allowed + 1e-6


def check_softmax(kernels: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    batch, captions, dim = shape
    emb, bank, scale = unit(batch, dim, seed=0, dtype=dtype), unit(captions, dim, seed=1, dtype=dtype), torch.tensor(30.0)
    want = reference.bank_softmax(emb.double(), bank.double(), scale.double())
    plain = reference.bank_softmax(emb, bank, scale)
    for got, exact, eager in zip(kernels.bank_softmax(emb, bank, scale), want, plain, strict=True):
        assert_as_exact(got, exact, eager)


def check_logits(kernels: Any, low: float, high: float) -> None:
    """Ever higher logits over three tiles: what was summed before must shrink each time. All of them low: padding must not count."""
    emb, bank = torch.ones(3, 1), torch.linspace(low, high, 601)[:, None]
    lse, mean = kernels.bank_softmax(emb, bank, torch.tensor(1.0))
    want = reference.bank_softmax(emb.double(), bank.double(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(lse.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.double(), want[1], rtol=1e-6, atol=1e-6)


def check_stats(kernels: Any, groups: Tensor | None, seed: int) -> None:
    """Few small integers: sums are exact and ties abound, so counts must equal the definition's."""
    emb, bank = integers(21, 5, seed=seed), integers(300, 5, seed=seed + 1)
    if groups is not None:
        bank = bank[groups]
    targets = torch.randint(0, len(bank), (21,), generator=torch.Generator().manual_seed(seed))
    got = kernels.bank_stats(emb, bank, torch.tensor(0.5), targets, groups)
    want = reference.bank_stats(emb, bank, torch.tensor(0.5), targets, groups)
    torch.testing.assert_close(got[0], want[0])
    for found, defined in zip(got[1:], want[1:], strict=True):
        assert torch.equal(found, defined)


def check_topk(kernels: Any, k: int, bank: Tensor) -> None:
    emb = integers(17, bank.shape[1], seed=5)
    values, indices = kernels.bank_topk(emb, bank, k)
    want_values, want_indices = reference.bank_topk(emb, bank, k)
    assert torch.equal(indices, want_indices)
    assert torch.equal(values, want_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(engine: Engine, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_softmax(engine, dtype, shape)


@pytest.mark.parametrize(("low", "high"), [(-90.0, 60.0), (-300.0, -200.0), (60.0, -90.0)])
def test_softmax_when_logits_rise_or_are_low(engine: Engine, low: float, high: float) -> None:
    check_logits(engine, low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_over_several_chunks_of_a_bank(engine: Engine, dtype: torch.dtype) -> None:
    check_softmax(engine, dtype, (9, 1030, 512))


@pytest.mark.parametrize("grouped", [False, True])
def test_stats(engine: Engine, grouped: bool) -> None:
    for seed in range(5):
        groups = torch.randint(0, 60, (300,), generator=torch.Generator().manual_seed(seed)) if grouped else None
        check_stats(engine, groups, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stats_of_ordinary_features(engine: Engine, dtype: torch.dtype) -> None:
    emb, bank, scale = unit(50, 96, seed=0, dtype=dtype), unit(400, 96, seed=1, dtype=dtype), torch.tensor(20.0)
    targets = torch.arange(50) * 7
    got = engine.bank_stats(emb, bank, scale, targets, None)
    want = reference.bank_stats(emb.double(), bank.double(), scale.double(), targets)
    plain = reference.bank_stats(emb, bank, scale, targets)
    for i in range(2):
        assert_as_exact(got[i], want[i], plain[i])
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[3], want[3])


def test_equal_captions_tie_exactly(engine: Engine) -> None:
    """A twin of the true caption ties with it wherever in the bank it lies, whatever its features are."""
    emb, bank = unit(40, 77, seed=0, dtype=torch.float32), unit(500, 77, seed=1, dtype=torch.float32)
    for place in (0, 31, 499):
        twins = bank.clone()
        twins[place] = twins[250]
        _, _, greater, equal = engine.bank_stats(emb, twins, torch.tensor(1.0), torch.full((40,), 250), None)
        assert equal.tolist() == [1] * 40
        assert torch.equal(engine.bank_stats(emb, twins, torch.tensor(1.0), torch.full((40,), place), None)[2], greater)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "constant"])
@pytest.mark.parametrize("k", [1, 3, 100, 1024])
def test_topk_is_a_stable_sort(engine: Engine, k: int, order: str) -> None:
    """Rising scores fill the candidates' buffer again and again, falling ones once; constant ones must stay in order."""
    bank = integers(2500, 2, seed=3, most=40)
    if order == "constant":
        bank = torch.ones(2500, 2)
    elif order != "random":
        bank = bank[torch.argsort(bank.sum(dim=1), descending=order == "falling")]
    check_topk(engine, k, bank)


def test_both_zeros_tie(engine: Engine) -> None:
    """A product too small for a float is -0; as a number it equals 0, as bits it does not."""
    bank = torch.zeros(200, 1)
    bank[::3] = 1e-30
    assert engine.bank_topk(torch.tensor([[-1e-30]]), bank, 150)[1].tolist() == [list(range(150))]


def test_topk_of_every_caption(engine: Engine) -> None:
    check_topk(engine, 300, integers(300, 3, seed=1))


def test_the_same_pair_scores_the_same_everywhere(engine: Engine) -> None:
    emb, bank = unit(37, 45, seed=0, dtype=torch.float32), unit(333, 45, seed=1, dtype=torch.float32)
    scores, indices = engine.bank_topk(emb, bank, 5)
    assert torch.equal(engine.pair_scores(emb, bank, indices), scores)
    assert torch.equal(engine.bank_stats(emb, bank, torch.tensor(1.0), indices[:, 3].contiguous(), None)[1], scores[:, 3])
    assert torch.equal(engine.bank_stats(emb, bank, torch.tensor(1.0), indices[:, 3].contiguous(), None)[2], torch.full((37,), 3).int())
    gaps = indices.clone()
    gaps[::2, 1] = -1
    found = engine.pair_scores(emb, bank, gaps)
    assert torch.equal(found, scores.masked_fill(gaps < 0, -torch.inf))
    assert engine.pair_scores(emb, bank, gaps[:, :0]).shape == (37, 0)


def test_results_do_not_depend_on_threads_or_neighbours(engine: Engine) -> None:
    emb, bank, scale = unit(50, 40, seed=0, dtype=torch.float32), unit(700, 40, seed=1, dtype=torch.float32), torch.tensor(9.0)

    def everything(rows: slice = slice(None)) -> list[Tensor]:
        targets = torch.arange(50)[rows]
        softmax, stats = engine.bank_softmax(emb[rows], bank, scale), engine.bank_stats(emb[rows], bank, scale, targets, None)
        return [*softmax, *stats, *engine.bank_topk(emb[rows], bank, 20), engine.pair_scores(emb[rows], bank, targets[:, None])]

    one = everything()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (13, 29), (49, 50)):
        part = everything(slice(first, last))
        assert all(torch.equal(a[first:last], b) for a, b in zip(one, part, strict=True))


def test_rows_may_lie_apart(engine: Engine) -> None:
    emb, bank = unit(20, 70, seed=0, dtype=torch.float32), unit(150, 70, seed=1, dtype=torch.float32)
    wide_emb, wide_bank = torch.full((20, 99), torch.nan), torch.full((300, 80), torch.nan)
    wide_emb[:, 5:75], wide_bank[::2, :70] = emb, bank
    views = wide_emb[:, 5:75], wide_bank[::2, :70]
    assert cpp.covers(*views)
    for a, b in zip(engine.bank_softmax(*views, torch.tensor(5.0)), engine.bank_softmax(emb, bank, torch.tensor(5.0)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan, 3.4e38, -3.4e38], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 0.0, -2.0])
def test_what_is_not_finite(engine: Engine, special: float, scale: float) -> None:
    """As torch has it: see `reference`."""
    emb, bank, targets = integers(9, 3, seed=1), integers(130, 3, seed=2), torch.arange(9)
    emb[2, 1], emb[5, 0], bank[77, 2] = special, special, special
    multiplier = torch.tensor(scale)
    got, want = engine.bank_stats(emb, bank, multiplier, targets, None), reference.bank_stats(emb, bank, multiplier, targets)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(engine.bank_topk(emb, bank, 20), reference.bank_topk(emb, bank, 20), equal_nan=True)
    torch.testing.assert_close(
        engine.bank_softmax(emb, bank, multiplier)[0], reference.bank_softmax(emb, bank, multiplier)[0], equal_nan=True
    )


def test_denormal_numbers_do_no_harm(engine: Engine) -> None:
    emb, bank = torch.full((3, 4), 1e-40), torch.full((5, 4), 1e-3)
    lse, mean = engine.bank_softmax(emb, bank, torch.tensor(1.0))
    torch.testing.assert_close(lse, torch.full((3,), math.log(5)))
    torch.testing.assert_close(mean, torch.full((3, 4), 1e-3))


def test_the_power_of_four_is_within_two_units_in_the_last_place(engine: Engine) -> None:
    bits = torch.arange(0x80000000, 0xC27C0001, 97)  # negative floats from -0 to -63
    x = (bits - 2**32).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.linspace(0, 63, 10_000)])
    x = x[: len(x) // 16 * 16].contiguous()
    got = x.clone()
    native().module.kernels.powers_of_four(engine.name, got)
    want = (2 * x.double()).exp2()
    unit_in_last_place = torch.ldexp(torch.ones_like(want), torch.frexp(want).exponent - 24)
    assert ((got.double() - want).abs() / unit_in_last_place).max() < 1.5
    ends = torch.tensor([-torch.inf, -80.0, -1e30, torch.nan, 0.0, -0.0] + [0.0] * 10)
    native().module.kernels.powers_of_four(engine.name, ends)
    torch.testing.assert_close(ends[:6], torch.tensor([0.0, 0.0, 0.0, torch.nan, 1.0, 1.0]), equal_nan=True)


def test_float32_through_tiles_ranks_as_float64_does() -> None:
    """Six products of bfloat16 parts: the 100 best are those of float64 on at least 99.9 % of rows."""
    emb, bank = unit(64, 512, seed=0, dtype=torch.float32), unit(1000, 512, seed=1, dtype=torch.float32)
    found = cpp.bank_topk(emb, bank, 100, engine="emulated")[1].sort(dim=1).values
    want = reference.bank_topk(emb.double(), bank.double(), 100)[1].sort(dim=1).values
    assert (found == want).all(dim=1).double().mean() >= 0.999


class Wrong(Engine):
    """An implementation with one fault, chosen by name."""

    def __init__(self, fault: str) -> None:
        super().__init__(ENGINES[-1])
        self.fault = fault

    def bank_softmax(self, emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        parts = [super(Wrong, self).bank_softmax(emb, part, scale) for part in bank.split(128)]
        lse = torch.stack([part[0] for part in parts])
        weights = torch.softmax(lse, dim=0)
        if self.fault == "no rescale":
            weights = torch.full_like(weights, 1 / len(parts))
        mean = sum(weight[:, None] * part[1] for weight, part in zip(weights, parts, strict=True))
        if self.fault == "padding counts":
            lse = torch.logaddexp(lse, torch.tensor(0.0))
        return (lse[0] if self.fault == "last tile only" else torch.logsumexp(lse, dim=0)), mean

    def bank_stats(self, emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, ...]:
        lse, best, greater, equal = super().bank_stats(emb, bank, scale, targets, None if self.fault == "groups ignored" else groups)
        if self.fault == "ties count as greater":
            greater, equal = greater + equal, torch.zeros_like(equal)
        return lse, best, greater, equal + 1 if self.fault == "target counts itself" else equal

    def bank_topk(self, emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.fault == "ties from the end":
            scores, indices = super().bank_topk(emb, bank.flip(0), k)
            return scores, len(bank) - 1 - indices
        if self.fault == "a candidate lost":
            scores, indices = super().bank_topk(emb, bank, k + 1)
            return scores[:, 1:], indices[:, 1:]
        return super().bank_topk(emb, bank, k)


CHECKS: dict[str, Callable[[Any], None]] = {
    "no rescale": lambda kernels: check_logits(kernels, -90.0, 60.0),
    "last tile only": lambda kernels: check_logits(kernels, -90.0, 60.0),
    "padding counts": lambda kernels: check_logits(kernels, -300.0, -200.0),
    "groups ignored": lambda kernels: check_stats(kernels, torch.arange(300) // 5, 0),
    "ties count as greater": lambda kernels: check_stats(kernels, None, 0),
    "target counts itself": lambda kernels: check_stats(kernels, None, 0),
    "ties from the end": lambda kernels: check_topk(kernels, 7, integers(300, 3, seed=1)),
    "a candidate lost": lambda kernels: check_topk(kernels, 7, integers(300, 3, seed=1)),
}


@pytest.mark.parametrize("fault", CHECKS)
def test_a_wrong_kernel_is_caught(fault: str) -> None:
    CHECKS[fault](Wrong("none"))
    with pytest.raises(AssertionError):
        CHECKS[fault](Wrong(fault))


def test_an_index_that_nobody_checked_is_refused_before_memory_is_read(engine: Engine) -> None:
    """As a compiled program passes them, which reads no values while it is traced."""
    emb, bank, scale = unit(3, 8, seed=0, dtype=torch.float32), unit(9, 8, seed=1, dtype=torch.float32), torch.tensor(1.0)
    for wrong in (9, 2**40, -2):
        with pytest.raises(ValueError, match=f"no caption {wrong}"):
            engine.pair_scores(emb, bank, torch.tensor([[0], [1], [wrong]]))
        with pytest.raises(ValueError, match=f"no caption {wrong}"):
            engine.bank_stats(emb, bank, scale, torch.tensor([0, wrong, 1]), None)
    with pytest.raises(ValueError, match="k"):
        engine.bank_topk(emb, bank, 0)


def test_helpers_treat_denormal_numbers_as_their_caller_does() -> None:
    """Whatever the setting was when the pool's threads began."""
    emb = bank = torch.full((512, 8), 1e-20)
    indices = torch.arange(8).expand(512, 8).contiguous()
    engine, threads = Engine(ENGINES[-1]), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine.pair_scores(emb, bank, indices)
        for flushed in (True, False, True):
            torch.set_flush_denormal(flushed)
            counts = {int(engine.pair_scores(emb, bank, indices).count_nonzero()) for _ in range(20)}
            assert counts == {0 if flushed else indices.numel()}
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
