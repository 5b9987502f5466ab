"""`bank_stats`, `bank_topk` and `pair_scores` in Triton's interpreter: counts and order exact, ties included; broken copies caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from pairclip_fast.kernels import reference, tiles, triton_scores, triton_stats, triton_topk
from pairclip_fast.kernels.tiles import Tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = torch.tensor(3.0)
TILE = Tile(rows=16, columns=32, depth=16, warps=4, stages=2)
ALL_NAN = pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # numpy's, in the interpreter


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def tied(batch: int, captions: int, *, dim: int = 16, seed: int = 0, kinds: int = 10**6) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers, so that scores are exact in every arithmetic and tie by the dozen; repeated rows share a group."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, min(kinds, captions), (captions,), generator=generator)
    bank = torch.randint(-1, 2, (captions, dim), generator=generator).float()[groups]
    return torch.randint(-1, 2, (batch, dim), generator=generator).float(), bank, groups


def stats(
    emb: Tensor, bank: Tensor, targets: Tensor, groups: Tensor | None, splits: int = 1, module: ModuleType = triton_stats
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = module.bank_stats(emb, bank, SCALE, targets, groups, tile=TILE, pair_tile=TILE, splits=splits)
    return found


def same_stats(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return torch.allclose(got[0], want[0].float(), rtol=1e-6, atol=1e-5, equal_nan=True) and all(
        torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)) for a, b in zip(got[1:], want[1:], strict=True)
    )


@ALL_NAN
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_that_overflowed_is_counted_too(rows: int) -> None:
    """Its guess is infinite; nothing may be left of the fresh memory, which is NaN here."""
    emb, bank = torch.full((rows, 16), torch.inf), torch.ones(20, 16)
    lse, positive, greater, equal = stats(emb, bank, torch.zeros(rows, dtype=torch.int64), None, splits=2)
    assert positive.isinf().all()
    assert lse.isinf().all() or lse.isnan().all()
    assert ((greater + equal == 19) | (greater == 20)).all()


def test_a_target_that_does_not_exist_ranks_last() -> None:
    emb, bank = unit(3, 16).float(), unit(40, 16, seed=1).float()
    _, positive, greater, equal = stats(emb, bank, torch.tensor([0, 40, 2**40]), None)
    assert positive.isnan().tolist() == [False, True, True]
    assert (greater + equal).tolist()[1:] == [40, 40]


def test_a_caption_that_does_not_exist_scores_nan() -> None:
    emb, bank = unit(3, 16).float(), unit(5, 16, seed=1).float()
    found = triton_scores.pair_scores(emb, bank, torch.tensor([[5, 0], [-1, 4], [2**40, 1]]), tile=TILE)
    assert found.isnan().tolist() == [[True, False], [False, False], [True, False]]
    assert found.isneginf().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("batch", "captions", "kinds", "splits", "dtypes"),
    [
        (1, 1, 1, 1, DTYPES),
        (15, 31, 5, 1, DTYPES[:1]),
        (16, 64, 64, 2, DTYPES[:1]),
        (17, 33, 8, 2, DTYPES),
        (64, 97, 20, 3, DTYPES[:1]),
        (5, 129, 1, 4, DTYPES[:1]),
    ],
)
def test_stats_equal_the_definition(batch: int, captions: int, kinds: int, splits: int, dtypes: list[torch.dtype]) -> None:
    emb, bank, groups = tied(batch, captions, kinds=kinds)
    targets = torch.arange(batch) * 7 % captions
    for given_groups in (groups * 2**40, None):  # any numbers will do, also those that 32 bits do not hold
        want = reference.bank_stats(emb, bank, SCALE, targets, given_groups)
        for dtype in dtypes:
            assert same_stats(stats(emb.to(dtype), bank.to(dtype), targets, given_groups, splits), want), dtype


def test_stats_on_ordinary_features() -> None:
    emb, bank, targets = unit(16, 64), unit(151, 64, seed=1), torch.arange(16) * 3
    got = stats(emb.float(), bank.float(), targets, torch.arange(151) // 3, 2)
    want = reference.bank_stats(emb, bank, SCALE.double(), targets, torch.arange(151) // 3)
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=1e-6)
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[3], want[3])


def different_members() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups whose members differ, so the target's own score is not the best of its group and the guess is wrong."""
    emb, bank, _ = tied(20, 90, seed=3)
    return emb, bank, torch.arange(20), torch.arange(90) % 30


def test_a_wrong_guess_costs_time_not_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    emb, bank, targets, groups = different_members()
    want = reference.bank_stats(emb, bank, SCALE, targets, groups)
    assert same_stats(stats(emb, bank, targets, groups, 2), want)
    monkeypatch.setattr(triton_stats, "pair_scores", lambda _emb, _bank, indices, tile: torch.full(indices.shape, 0.5))
    assert same_stats(stats(emb, bank, targets, groups, 2), want)


@ALL_NAN
def test_nan_is_the_worst_rank() -> None:
    emb, bank, groups = tied(20, 70, kinds=30)
    emb[3, 5] = torch.nan
    targets = torch.arange(20)
    assert same_stats(stats(emb, bank, targets, groups, 2), reference.bank_stats(emb, bank, SCALE, targets, groups))
    bank[11] = torch.nan  # one caption damages every row
    got = stats(emb, bank, targets, None, 2)
    assert got[0].isnan().all()
    assert got[2].tolist() == [70] * 20
    assert got[3].tolist() == [0] * 20


@settings(max_examples=5)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 70), st.integers(1, 3))
def test_stats_do_not_depend_on_the_order_of_captions(seed: int, batch: int, captions: int, splits: int) -> None:
    emb, bank, groups = tied(batch, captions, seed=seed, kinds=9)
    targets = torch.arange(batch) % captions
    order = torch.randperm(captions, generator=torch.Generator().manual_seed(seed))
    before = stats(emb, bank, targets, groups, splits)
    after = stats(emb, bank[order], torch.argsort(order)[targets], groups[order], splits)
    assert same_stats(after, before)


def topk(emb: Tensor, bank: Tensor, k: int, *, processors: int = 1, module: ModuleType = triton_topk) -> tuple[Tensor, Tensor]:
    scores, indices = module.bank_topk(emb, bank, k, tile=TILE, processors=processors)
    return scores, indices


def same_topk(got: tuple[Tensor, Tensor], emb: Tensor, bank: Tensor, k: int) -> bool:
    scores, indices = reference.bank_topk(emb.float(), bank.float(), k)
    return torch.equal(got[0].nan_to_num(nan=7e7), scores.nan_to_num(nan=7e7)) and torch.equal(got[1], indices)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take candidate lists for small banks too; the fixture's value collects how many rows went the plain way."""
    plain: list[int] = []
    sorted_rows = triton_topk.sorted_rows

    def watched(emb: Tensor, bank: Tensor, k: int, *, tile: Tile) -> tuple[Tensor, Tensor]:
        plain.append(len(emb))
        return sorted_rows(emb, bank, k, tile=tile)

    monkeypatch.setattr(triton_topk, "sorted_rows", watched)
    monkeypatch.setattr(triton_topk, "SMALL_BANK", 0)
    monkeypatch.setattr(triton_topk, "MOST_LISTED", 100.0)  # small banks in several parts
    monkeypatch.setattr(tiles, "LEAST_TILES_PER_SPLIT", 1)
    return plain


@pytest.mark.parametrize(
    ("batch", "captions", "k", "processors", "dtypes"),
    [(17, 101, 1, 1, DTYPES), (16, 160, 5, 64, DTYPES[:1]), (33, 145, 4, 4, DTYPES[:1]), (3, 40, 40, 1, DTYPES[:1])],
)
def test_topk_is_a_stable_sort(lists: list[int], batch: int, captions: int, k: int, processors: int, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        emb, bank = (features.to(dtype) for features in tied(batch, captions, kinds=100)[:2])
        assert same_topk(topk(emb, bank, k, processors=processors), emb, bank, k), dtype
    assert lists == ([batch] if k == captions else [])


def test_topk_of_a_small_bank_sorts_rows() -> None:
    emb, bank, _ = tied(5, 200)
    assert same_topk(topk(emb, bank, 3), emb, bank, 3)


@pytest.mark.parametrize("workspace", [1, 30_000])
def test_topk_in_blocks_of_rows(lists: list[int], monkeypatch: pytest.MonkeyPatch, workspace: int) -> None:
    monkeypatch.setattr(triton_topk, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(triton_topk, "LARGEST_SAMPLE", 30)
    emb, bank, _ = tied(17, 150)
    assert same_topk(topk(emb, bank, 2), emb, bank, 2)


@ALL_NAN
def test_rows_with_unusable_lists_go_the_plain_way(lists: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions equal to the threshold overflow the list, and so does a row of NaN."""
    monkeypatch.setattr(triton_topk, "SLACK", 40)
    emb, bank, _ = tied(9, 300)
    emb[2] = 0.0
    emb[4, 1] = torch.nan
    assert same_topk(topk(emb, bank, 3), emb, bank, 3)
    assert lists == [2]


def test_a_threshold_out_of_reach_costs_time_not_truth(lists: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness does not rest on the sample: here its scores are all far too high, and no list has k candidates."""
    row_scores = triton_topk.row_scores

    def too_high(emb: Tensor, bank: Tensor, *, step: int, tile: Tile) -> Tensor:
        return row_scores(emb, bank, step=step, tile=tile) + (100 if step > 1 else 0)

    monkeypatch.setattr(triton_topk, "row_scores", too_high)
    emb, bank, _ = tied(9, 300)
    assert same_topk(topk(emb, bank, 3), emb, bank, 3)
    assert lists == [9]


@ALL_NAN
def test_a_nan_caption_comes_first_as_torch_sorts(lists: list[int]) -> None:
    emb, bank, _ = tied(9, 300)
    bank[7], bank[80] = torch.nan, torch.nan  # one not in the sample, one in it
    assert same_topk(topk(emb, bank, 3), emb, bank, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_and_rows_agree(dtype: torch.dtype) -> None:
    """But for rounding: the interpreter multiplies tiles by numpy's library, where a column's place may change the order of sums."""
    emb, bank = unit(17, 48).to(dtype), unit(70, 48, seed=1).to(dtype)
    rows = triton_scores.row_scores(emb, bank, step=1, tile=TILE)
    want = emb.double() @ bank.double().T
    torch.testing.assert_close(rows.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(triton_scores.row_scores(emb, bank, step=3, tile=TILE), rows[:, ::3], rtol=0, atol=2e-7)
    indices = torch.randint(-1, 70, (17, 3), generator=torch.Generator().manual_seed(0))
    pairs = triton_scores.pair_scores(emb, bank, indices, tile=TILE)
    assert torch.equal(pairs.isneginf(), indices < 0)
    torch.testing.assert_close(pairs, rows.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf), rtol=0, atol=2e-7)
    assert triton_scores.pair_scores(emb, bank, indices[:, :0], tile=TILE).shape == (17, 0)


@pytest.mark.parametrize("captions", [400, triton_topk.SMALL_BANK + 1])
def test_no_rows_no_results(captions: int) -> None:
    emb, bank = torch.empty(0, 16), torch.ones(captions, 16)
    assert [tuple(part.shape) for part in stats(emb, bank, torch.empty(0, dtype=torch.int64), None)] == [(0,)] * 4
    assert topk(emb, bank, 3)[1].shape == (0, 3)


def test_the_order_of_programs_does_not_matter(lists: list[int], shuffled_programs: Callable[[int], None]) -> None:
    emb, bank, groups = tied(17, 150, kinds=30)
    targets = torch.arange(17)

    def everything() -> list[Tensor]:
        return [*stats(emb, bank, targets, groups, 2), *topk(emb, bank, 3, processors=64)]

    first = everything()
    shuffled_programs(0)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def far_rows(path: Path) -> tuple[Tensor, Tensor]:
    """A bank whose rows lie up to 2**31.3 elements after the first, and room as far before it: an offset that wraps around is
    a wrong answer, not a crash. The file is sparse, so it takes a few pages."""
    rows, stride, before = 40, 2**26, 2**31
    storage = torch.from_file(str(path), shared=True, size=before + rows * stride, dtype=torch.float16)
    bank = storage.as_strided((rows, 16), (stride, 1), before)
    bank.copy_(tied(1, rows)[1])
    return tied(5, 1, seed=4)[0].half(), bank


def test_offsets_have_64_bits(tmp_path: Path, mutated: Callable[[str, str, str], ModuleType]) -> None:
    emb, bank = far_rows(tmp_path / "bank")
    want = emb.float() @ bank.float().T
    assert torch.equal(triton_scores.row_scores(emb, bank, step=1, tile=TILE), want)
    broken = mutated("triton_scores", "columns[None, :].to(tl.int64) * bank_stride", "(columns[None, :] * bank_stride).to(tl.int32)")
    assert not torch.equal(broken.row_scores(emb, bank, step=1, tile=TILE), want)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("rival", "rival", id="control: nothing is broken"),
        pytest.param("rival = inside & ~mine", "rival = ~mine", id="padding competes"),
        pytest.param("rival = inside & ~mine", "rival = inside", id="positives compete"),
        pytest.param("scores > target[:, None]", "scores >= target[:, None]", id="ties count as better"),
        pytest.param("scores == target[:, None]", "scores >= target[:, None]", id="better ones count as ties"),
        pytest.param("count(positive, guess)", "pass", id="a wrong guess is kept"),
        pytest.param("if tl.max(((target", "if tl.min(((target", id="one right guess hides a wrong one"),
        pytest.param("total = total * tl.exp2(high - higher) +", "total = total +", id="the sum is not rescaled"),
        pytest.param('scores * scale2, float("-inf"))', "scores * scale2, 0.0)", id="padding has weight"),
        pytest.param("part.sum(dim=0", "part[:1].sum(dim=0", id="counts of a split are lost"),
        pytest.param("torch.logsumexp(part_lse, dim=0)", "part_lse.sum(dim=0)", id="log-partitions are added"),
        pytest.param("torch.where(damaged, captions, greater)", "greater", id="a NaN row ranks first"),
        pytest.param("if groups is not None else place", "if groups is None else place", id="groups are ignored"),
    ],
)
@ALL_NAN
def test_broken_counting_is_caught(mutated: Callable[[str, str, str], ModuleType], old: str, new: str) -> None:
    assert counting_is_right(mutated("triton_stats", old, new)) == (old == new)


def counting_is_right(module: ModuleType) -> bool:
    emb, bank, targets, groups = different_members()
    emb[0, 0], emb[1] = torch.nan, 0.0  # a row of equal logits feels every column that does not belong
    return all(
        same_stats(stats(emb, bank, targets, chosen, 2, module), reference.bank_stats(emb, bank, SCALE, targets, chosen))
        for chosen in (groups, torch.arange(90))
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tl.cumsum", "tl.cumsum", id="control: nothing is broken"),
        pytest.param("~(scores < least[:, None])", "(scores > least[:, None])", id="captions equal to the threshold are lost"),
        pytest.param("& (column < captions)[None, :]", "", id="padding is listed"),
        pytest.param("tl.cumsum(one, 1) - one", "one - one", id="candidates overwrite each other"),
        pytest.param("found += tl.sum(one, 1)", "found += 0", id="every tile starts the list anew"),
        pytest.param("best, order = found.sort(", "best, order = found.flip(1).sort(", id="the later of two equals wins"),
        pytest.param("(counts <= capacity).all(dim=1)", "(counts >= 0).all(dim=1)", id="overflow is not noticed"),
        pytest.param(".values[:, -1]", ".values[:, 0]", id="the threshold is the best of the sample"),
        pytest.param("tl.num_programs(1) + split", "tl.num_programs(1)", id="splits share a list"),
    ],
)  # fmt: skip
@ALL_NAN
def test_broken_lists_are_caught(
    monkeypatch: pytest.MonkeyPatch, mutated: Callable[[str, str, str], ModuleType], old: str, new: str
) -> None:
    monkeypatch.setattr(tiles, "LEAST_TILES_PER_SPLIT", 1)
    assert lists_are_right(mutated("triton_topk", old, new)) == (old == new)


def lists_are_right(module: ModuleType) -> bool:
    """Two cases: rows whose lists overflow, and lists long enough for all, whose answers the plain way must not correct."""
    module.SMALL_BANK, module.SLACK, module.MOST_LISTED = 0, 0, 100.0  # type: ignore[attr-defined]
    emb, bank, _ = tied(9, 150)
    bank[:, 0] = torch.where(torch.arange(150) % 8 == 0, 0, 5)
    bank[149] = 9.0
    emb[2] = F.one_hot(torch.tensor(0), 16)  # what is sampled scores 0, the rest overflows the list, the best comes last
    emb[3], emb[4, 1] = 1.0, torch.nan
    if not same_topk(topk(emb, bank, 3, module=module), emb, bank, 3):
        return False
    module.sorted_rows, module.SLACK = None, 256  # type: ignore[attr-defined]
    emb = tied(9, 1, seed=5)[0]
    try:
        return same_topk(topk(emb, bank, 3, processors=64, module=module), emb, bank, 3)
    except TypeError:
        return False  # it took the plain way where the product does not
