"""The transformer blocks in C++ against float64: in bfloat16 on tiles in software and on the processor's where it has them, and in float32.

The rule for gradients: the relative error of every tensor is at most 1.3 times that of plain blocks in the same format, plus a few
roundings. In bfloat16 plain blocks are those under autocast, and one rounding is what a gradient that autocast happens to leave in
float32 has here too; in float32 sums of thousands of numbers come in another order. A check is a function
of what runs the blocks, so that wrong versions can be shown to fail it.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pairclip_fast.models import tower
from pairclip_fast.models.blocks import Activation, Block, initialise
from pairclip_fast.native import native

ENGINES: list[str] = native().module.tower.engines() if native().module else []
pytestmark = pytest.mark.skipif(not ENGINES, reason=native().reason)
FAST = [name for name in ENGINES if name not in ("emulated", "portable")]
FLOAT32 = ("portable", "avx2", "avx512")
SLACK = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-20}
"""Relative error that is always allowed."""
Run = Callable[[nn.ModuleList, Tensor], Tensor]


class Case(NamedTuple):
    batch: int
    tokens: int
    width: int
    heads: int
    mlp_width: int
    depth: int
    activation: Activation
    pre_norm: bool


SMALL = [
    Case(3, 33, 64, 2, 96, 2, "gelu", True),
    Case(5, 1, 32, 1, 64, 1, "silu", True),
    Case(2, 16, 160, 5, 320, 1, "gelu", True),
    Case(2, 17, 64, 1, 32, 2, "relu", False),
    Case(1, 32, 64, 2, 64, 1, "gelu", False),
    Case(2, 48, 96, 3, 64, 1, "silu", True),
    Case(1, 64, 128, 1, 64, 1, "gelu", True),
]
LARGE = [
    Case(7, 33, 512, 8, 2048, 1, "gelu", True),
    Case(5, 33, 512, 1, 1024, 1, "relu", False),
    Case(13, 16, 160, 5, 320, 4, "gelu", True),
    Case(19, 33, 544, 1, 576, 1, "silu", True),
    Case(2, 47, 1024, 16, 1056, 1, "gelu", False),
]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_workspaces() -> None:
    tower.drop_free_workspaces()


def blocks_of(case: Case, *, spread: float = 1.0) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        Block(case.width, heads=case.heads, mlp_width=case.mlp_width, activation=case.activation, pre_norm=case.pre_norm)
        for _ in range(case.depth)
    )
    initialise(blocks)
    for parameter in blocks.parameters():
        parameter.data.mul_(spread)
        if parameter.ndim == 1:  # no bias of zero, no weight of one
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return blocks


def inputs_of(case: Case, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.tokens, case.width)
    return scale * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def one_by_one(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    for block in blocks:
        tokens = block(tokens)
    return tokens


def numbers_of(engine: str) -> torch.dtype:
    return torch.float32 if engine in FLOAT32 else torch.bfloat16


def on(engine: str) -> Run:
    return lambda blocks, tokens: tower.run(blocks, tokens, engine=engine)


def gradients(run: Run, blocks: nn.ModuleList, tokens: Tensor, weights: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """The result, and the gradients of its weighted sum; under autocast to bfloat16 if so wanted."""
    tokens = tokens.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = run(blocks, tokens)
    named = dict(blocks.named_parameters())
    found = torch.autograd.grad((result * weights).sum(), [tokens, *named.values()])
    return {"result": result.detach(), **dict(zip(["tokens", *named], found, strict=True))}


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def wrong_ones(run: Run, case: Case, numbers: torch.dtype) -> list[str]:
    """What `run` computes less accurately than the rule allows for that format."""
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    exact = gradients(one_by_one, copy.deepcopy(blocks).double(), tokens.double(), weights.double())
    plain = gradients(one_by_one, blocks, tokens, weights, autocast=numbers == torch.bfloat16)
    found = gradients(run, blocks, tokens, weights)
    assert all(found[name].dtype == torch.float32 and found[name].shape == right.shape for name, right in exact.items())
    return [
        f"{name}: {error(found[name], right):.1e}, plain {error(plain[name], right):.1e}"
        for name, right in exact.items()
        if not error(found[name], right) <= 1.3 * error(plain[name], right) + SLACK[numbers]
    ]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_are_as_accurate_as_plain_ones(engine: str, case: Case) -> None:
    assert wrong_ones(on(engine), case, numbers_of(engine)) == []


@pytest.mark.skipif(not FAST, reason="this processor has no vectors or products that are taken for it, or they are not in use")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gradients_of_real_sizes(case: Case) -> None:
    for name in FAST:
        assert wrong_ones(on(name), case, numbers_of(name)) == []


class _Distorted(torch.autograd.Function):
    """A function with a gradient that is 4 % off."""

    @staticmethod
    def forward(_ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.04


@pytest.mark.parametrize("engine", ["emulated", "portable"])
@pytest.mark.parametrize("name", ["tokens", *(name for name, _ in blocks_of(SMALL[0]).named_parameters())])
def test_one_wrong_gradient_is_caught(name: str, engine: str) -> None:
    def wrong(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        distorted = {key: _Distorted.apply(value) if key == name else value for key, value in blocks.named_parameters()}
        entering = _Distorted.apply(tokens) if name == "tokens" else tokens
        assert isinstance(entering, Tensor)
        sizes = tower.sizes_of(blocks, tokens, threads=1, engine=engine)
        result: Tensor = tower._Tower.apply(entering, sizes, *distorted.values())
        return result

    case = Case(2, 33, 32, 1, 32, 2, "gelu", True)
    assert [line.split(":")[0] for line in wrong_ones(wrong, case, numbers_of(engine))] == [name]


@pytest.mark.parametrize("engine", ["emulated", "portable"])
def test_wrong_results_are_caught(engine: str) -> None:
    def without_last_token(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        return torch.cat([tower.run(blocks, tokens[:, :-1], engine=engine), tokens[:, -1:]], dim=1)

    def without_activation_slope(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        other = copy.deepcopy(blocks)
        for block, twin in zip(blocks, other, strict=True):
            assert isinstance(block, Block)
            twin.load_state_dict(block.state_dict())
            twin.mlp[1] = nn.SiLU()  # type: ignore[index]
        sizes = tower.sizes_of(other, tokens, threads=1, engine=engine)
        result: Tensor = tower._Tower.apply(tokens, sizes, *blocks.parameters())
        return result

    for wrong in (without_last_token, without_activation_slope):
        assert len(wrong_ones(wrong, SMALL[0], numbers_of(engine))) > 10


def test_results_are_the_same_bits_for_any_number_of_threads(engine: str) -> None:
    case = Case(5, 33, 64, 2, 96, 2, "gelu", True) if engine == "emulated" else Case(37, 33, 192, 2, 608, 2, "gelu", True)
    blocks, given = blocks_of(case), inputs_of(case)
    runs = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(gradients(on(engine), blocks, *given))
    for other in runs[1:]:
        assert all(torch.equal(other[name], runs[0][name]) for name in other)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_nothing_comes_from_padding_or_from_what_was_in_the_memory(engine: str, pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 33, 64, 1, 64, 2, "gelu", pre_norm)
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    first = gradients(on(engine), blocks, tokens, weights)
    take = tower._take

    def full_of_nan(sizes: tower.Sizes) -> tower.Workspace:
        workspace = take(sizes)
        workspace.memory.fill_(255)
        return workspace

    monkeypatch.setattr(tower, "_take", full_of_nan)
    again = gradients(on(engine), blocks, tokens, weights)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    more = (torch.cat([tokens, 5 * tokens]), torch.cat([weights, 0 * weights]))
    beside = gradients(on(engine), blocks, *more)
    assert torch.equal(beside["result"][:2], first["result"])
    assert torch.equal(beside["tokens"][:2], first["tokens"])
    assert float(beside["tokens"][2:].abs().max()) == 0.0
    for name, _ in blocks.named_parameters():
        torch.testing.assert_close(beside[name], first[name], rtol=1e-4, atol=1e-4 * float(first[name].abs().max()))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_extreme_activations_stay_finite(engine: str, activation: Activation) -> None:
    case = Case(2, 33, 64, 2, 64, 2, activation, True)
    for spread, scale in ((30.0, 1.0), (1.0, 1e4), (1e-3, 1e-4)):
        blocks, given = blocks_of(case, spread=spread), inputs_of(case, scale=scale)
        found = gradients(on(engine), blocks, *given)
        assert all(bool(value.isfinite().all()) for value in found.values()), (spread, scale)


def test_nan_is_not_hidden(engine: str) -> None:
    case = SMALL[0]
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    tokens[1, 7, 3] = math.nan
    found = gradients(on(engine), blocks, tokens, weights)
    assert bool(found["result"][1].isnan().all())
    assert bool(found["result"][[0, 2]].isfinite().all())
    named = [name for name, _ in blocks.named_parameters()][:-1]  # the last bias's gradient depends on no activation
    assert all(bool(found[name].isnan().any()) for name in named)


@pytest.mark.parametrize(("name", "reference"), [("gelu", nn.GELU()), ("silu", nn.SiLU()), ("relu", nn.ReLU())])
def test_activations_and_their_slopes(engine: str, name: str, reference: nn.Module) -> None:
    far = torch.tensor([-1e30, -100.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 100.0, 1e30, math.nan])
    numbers = torch.cat([torch.linspace(-12, 12, 32_001), far])
    numbers = torch.cat([numbers, torch.zeros(-len(numbers) % 32)])
    values, slopes = torch.empty_like(numbers), torch.empty_like(numbers)
    native().module.tower.activate(engine, name, numbers, values, slopes)
    exact = numbers.double().requires_grad_()
    right = reference(exact)
    right.sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(values.double(), right.detach(), rtol=2e-6, atol=2e-6, equal_nan=True)
    known = ~numbers.isnan()
    torch.testing.assert_close(slopes[known].double(), exact.grad[known], rtol=2e-6, atol=2e-6)


def test_the_callers_denormal_numbers_are_left_alone(engine: str) -> None:
    case = SMALL[3]
    gradients(on(engine), blocks_of(case), *inputs_of(case))
    assert float(torch.tensor([1e-39]) * torch.tensor([0.5])) > 0.0


def test_several_forward_passes_before_a_backward_pass(engine: str) -> None:
    case = SMALL[0]
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    alone = [gradients(on(engine), blocks, part, weights) for part in (tokens, 2 * tokens)]
    entering = [part.clone().requires_grad_() for part in (tokens, 2 * tokens)]
    results = [tower.run(blocks, part, engine=engine) for part in entering]
    for i in (1, 0):
        (results[i] * weights).sum().backward()
    for i in (0, 1):
        assert torch.equal(results[i], alone[i]["result"])
        assert torch.equal(entering[i].grad, alone[i]["tokens"])  # type: ignore[arg-type]
    for name, parameter in blocks.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name])


def test_workspaces_are_used_again_and_given_back(engine: str) -> None:
    case = SMALL[0]
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    gradients(on(engine), blocks, tokens, weights)
    (kept,) = tower._free
    result = tower.run(blocks, tokens, engine=engine)
    assert tower._free == []
    other = tower.run(blocks, tokens[:1], engine=engine)
    assert other.shape == tokens[:1].shape
    del result
    gc.collect()
    assert [workspace.memory.data_ptr() for workspace in tower._free] == [kept.memory.data_ptr()], "dropped without a backward pass"
    for batch in (1, 2, 3):
        gradients(on(engine), blocks, tokens[:batch], weights[:batch])
    assert len(tower._free) == tower.MOST_FREE
    tower.drop_free_workspaces()
    assert tower._free == []


def test_a_second_backward_pass_is_refused(engine: str) -> None:
    case = SMALL[0]
    blocks, (tokens, weights) = blocks_of(case), inputs_of(case)
    loss = (tower.run(blocks, tokens.requires_grad_(), engine=engine) * weights).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once per forward pass"):
        loss.backward()
    loss = tower.run(blocks, tokens, engine=engine).square().sum()
    (first,) = torch.autograd.grad(loss, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_autograd_keeps_is_the_workspace(engine: str) -> None:
    case = SMALL[0]
    blocks, (tokens, _) = blocks_of(case), inputs_of(case)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tower.run(blocks, tokens.requires_grad_(), engine=engine)
    sizes = tower.sizes_of(blocks, tokens, threads=torch.get_num_threads(), engine=engine)
    assert kept == [native().module.tower.workspace_bytes(engine, tower._shape(sizes), sizes.threads)]


def test_sizes_that_are_not_covered_are_refused() -> None:
    shape = native().module.tower.Shape
    given = {"batch": 1, "tokens": 4, "width": 64, "mlp_width": 64, "heads": 2, "depth": 1, "pre_norm": True, "activation": "gelu"}
    shape(**given)
    for wrong in ({"heads": 4}, {"mlp_width": 48}, {"batch": 0}, {"activation": "tanh"}):
        with pytest.raises(ValueError, match="tower"):
            shape(**(given | wrong))
    blocks, (tokens, _) = blocks_of(SMALL[0]), inputs_of(SMALL[0])
    sizes = tower.sizes_of(blocks, tokens, threads=1, engine="emulated")
    small = torch.empty(1000, dtype=torch.uint8)
    parameters = [parameter.detach() for parameter in blocks.parameters()]
    for memory, some in ((small, parameters), (tower._take(sizes).memory, parameters[1:])):
        with pytest.raises(ValueError, match="tower"):
            native().module.tower.forward("emulated", 1, tower._shape(sizes), memory, tokens, some, torch.empty_like(tokens))
