"""The jobs of `kernels.py`: who does them, and what they must give.

A job is ranking, top-k, or loss with gradient. Each variant has a check against float64 arithmetic on the same inputs, which
runs before anything is timed. A variant that does less than the job (a bare matrix product) says so in its name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip_fast.kernels import ops

Call = Callable[[], Any]
CHECKED_ROWS = 64
"""Rows that are compared with float64."""
SCALE = 20.0
OPENBLAS_KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
"""OpenBLAS's names for what torch calls the CPU's capability."""


class WrongResultError(AssertionError):
    """A variant gave another answer than float64."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do a job: what is timed, and whether its result is right."""

    call: Call
    right: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One table; `products` matrix products of all rows with all captions."""

    name: str
    products: int
    rows: int
    variants: dict[str, Variant]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Unit vectors in one precision, with targets."""

    emb: Tensor
    bank: Tensor
    targets: Tensor

    @property
    def precision(self) -> str:
        return str(self.emb.dtype).removeprefix("torch.")


def make_problem(rows: int, captions: int, dim: int, dtype: torch.dtype) -> Problem:
    """Random unit vectors, from one seed."""
    generator = torch.Generator().manual_seed(0)
    emb, bank = (F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(dtype) for count in (rows, captions))
    return Problem(emb, bank, torch.randint(0, captions, (rows,), generator=generator))


def faiss_index(bank: Tensor) -> tuple[Any, str]:
    """A flat inner-product index of faiss and its version, or None and why there is none.

    The OpenBLAS in faiss' wheels does not know recent processors and then takes its code for those of 2004, a tenth as fast. It
    is told what the processor can do, unless the user's environment says so.
    """
    kind = OPENBLAS_KERNELS.get(torch.backends.cpu.get_cpu_capability())
    if kind:
        os.environ.setdefault("OPENBLAS_CORETYPE", kind)
    try:
        faiss = importlib.import_module("faiss")
    except ModuleNotFoundError:
        return None, "not installed"
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return index, f"{faiss.__version__}, OPENBLAS_CORETYPE={os.environ.get('OPENBLAS_CORETYPE', 'not set')}"


def rank_job(problems: Sequence[Problem], index: Any) -> Job:
    """How many captions score higher than the true one. faiss cannot count: its nearest equivalent is the best caption."""
    variants: dict[str, Variant] = {}
    for problem in problems:
        variants |= _rank_variants(problem)
    if index is not None:
        emb, exact = problems[0].emb, exact_scores(problems[0])
        variants["faiss float32, k=1"] = Variant(lambda: index.search(emb.numpy(), 1), functools.partial(_topk_right, exact=exact))
    return Job(name="ranks", products=1, rows=len(problems[0].emb), variants=variants)


def _rank_variants(problem: Problem) -> dict[str, Variant]:
    emb, bank, targets, precision = problem.emb, problem.bank, problem.targets, problem.precision
    exact = exact_scores(problem)
    own = exact.gather(1, targets[:CHECKED_ROWS, None])
    low, high = ((exact > own + margin).sum(dim=1) for margin in (1e-6, -1e-6))
    scores = torch.empty(len(emb), len(bank), dtype=emb.dtype)
    rounding = 1e-6 if emb.dtype == torch.float32 else 1e-2

    def right(ranks: Tensor) -> bool:
        return bool(((low <= ranks[:CHECKED_ROWS]) & (ranks[:CHECKED_ROWS] <= high)).all())

    def compare() -> Tensor:
        torch.mm(emb, bank.T, out=scores)
        return (scores > scores.gather(1, targets[:, None])).sum(dim=1)

    variants = {
        f"ours {precision}": Variant(lambda: ops.bank_stats(emb, bank, torch.tensor(SCALE), targets), lambda found: right(found.greater)),
        f"torch mm {precision} (product only)": Variant(
            lambda: torch.mm(emb, bank.T, out=scores),
            lambda found: bool((found[:CHECKED_ROWS].double() - exact).abs().max() < rounding),
        ),
    }
    if emb.dtype == torch.float32:  # bfloat16 scores tie by the hundred: ranks made from them are wrong
        variants[f"torch mm + compare {precision}"] = Variant(compare, right)
    return variants


def topk_job(problems: Sequence[Problem], index: Any, k: int) -> Job:
    """The k best captions of every row."""
    variants: dict[str, Variant] = {}
    for problem in problems:
        call = functools.partial(ops.bank_topk, problem.emb, problem.bank, k=k)
        exact = exact_scores(problem)
        variants[f"ours {problem.precision}"] = Variant(call, functools.partial(_topk_right, exact=exact))
    emb, bank, exact = problems[0].emb, problems[0].bank, exact_scores(problems[0])
    scores = torch.empty(len(emb), len(bank), dtype=emb.dtype)
    variants["torch mm + topk float32"] = Variant(
        lambda: torch.mm(emb, bank.T, out=scores).topk(k, dim=1), functools.partial(_topk_right, exact=exact)
    )
    if index is not None:
        variants["faiss float32"] = Variant(lambda: index.search(emb.numpy(), k), functools.partial(_topk_right, exact=exact))
    return Job(name=f"top {k}", products=1, rows=len(emb), variants=variants)


def _topk_right(found: Any, *, exact: Tensor) -> bool:
    indices = torch.as_tensor(found[1])[:CHECKED_ROWS]
    k = indices.shape[1]
    bound = exact.topk(k, dim=1).values[:, -1:] - 1e-6
    return bool((exact.gather(1, indices) >= bound).all()) and all(len(row.unique()) == k for row in indices)


def loss_job(problems: Sequence[Problem]) -> Job:
    """Mean cross entropy over the bank, and its gradient in the embeddings."""
    variants: dict[str, Variant] = {}
    for problem in problems:
        variants |= _loss_variants(problem)
    return Job(name="loss and gradient", products=2, rows=len(problems[0].emb), variants=variants)


def _loss_variants(problem: Problem) -> dict[str, Variant]:
    bank, targets, scale = problem.bank, problem.targets, torch.tensor(SCALE)
    emb = problem.emb.clone().requires_grad_()
    part = problem.emb[:CHECKED_ROWS].double()
    weights = torch.softmax(SCALE * part @ bank.double().T, dim=1)
    want = SCALE * (weights @ bank.double() - bank[targets[:CHECKED_ROWS]].double()) / len(emb)
    rounding = 1e-4 if emb.dtype == torch.float32 else 2e-2

    def right(found: tuple[Tensor, Tensor]) -> bool:
        return bool((found[1][:CHECKED_ROWS].double() - want).norm() < rounding * want.norm())

    def stepped(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, emb)[0]

    def ours() -> tuple[Tensor, Tensor]:
        return stepped(ops.bank_cross_entropy(emb, bank, scale, bank[targets]).mean())

    def chunked() -> tuple[Tensor, Tensor]:
        return stepped(F.linear_cross_entropy(SCALE * emb, bank, targets, options=torch.nn.LinearCrossEntropyOptions()))

    variants = {f"ours {problem.precision}": Variant(ours, right)}
    if emb.dtype == torch.float32:
        variants["torch linear_cross_entropy float32, chunked"] = Variant(chunked, right)
        variants["torch eager float32"] = Variant(lambda: stepped(F.cross_entropy(SCALE * emb @ bank.T, targets)), right)
    return variants


def exact_scores(problem: Problem) -> Tensor:
    """float64 scores of the first rows."""
    return problem.emb[:CHECKED_ROWS].double() @ problem.bank.double().T
