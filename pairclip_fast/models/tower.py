"""Training a stack of transformer blocks on a CPU: one autograd function in C++ (`csrc/tower`), where it is faster than torch.

Under bfloat16 autocast, on a CPU that multiplies bfloat16 fast, activations, and the residual stream too, are bfloat16 with float32
sums, statistics and parameters; the gradients of the parameters are float32 and as near to float32's as autocast's are. Without
autocast, on AMD's processors and with AVX2 alone, everything is float32.

All that the backward pass needs lies in one workspace, made once per shape and used again in the next step; the backward pass writes
gradients over activations, so it runs once. Results are the same bits in every run and for any number of threads.

Everything else (evaluation, other devices and precisions, recomputing, compiling) takes the blocks one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pairclip_fast.kernels.choice import Implementation
from pairclip_fast.models.blocks import ACTIVATIONS, Block
from pairclip_fast.models.precision import BF16_SETS, training_format, why_not_ours
from pairclip_fast.native import native

BLOCK = 32
"""Widths of heads and MLPs are multiples of it: two tiles."""
ENGINES = {torch.bfloat16: {name: name for name in BF16_SETS}, torch.float32: {"avx2": "avx2", "avx512_bf16": "avx512"}}
"""By format, the instruction sets of the native module with which ours wins, and the engine for each; the others are there for tests.

In float32 that is where the library is slow: on AMD's processors, the only ones to be called `avx512_bf16`, and with AVX2 alone."""
MOST_FREE = 2
"""Workspaces that are kept although no graph needs them: the next step's, and that of a last, smaller batch."""


class Sizes(NamedTuple):
    """What a workspace depends on."""

    batch: int
    tokens: int
    width: int
    mlp_width: int
    heads: int
    depth: int
    pre_norm: bool
    activation: str
    threads: int
    engine: str


class Workspace(NamedTuple):
    """Memory for one forward pass and its backward pass."""

    sizes: Sizes
    memory: Tensor


_free: list[Workspace] = []


def implementation(
    blocks: nn.ModuleList | None, *, device: torch.device, autocast: torch.dtype | None, recompute: bool, compiled: bool
) -> Implementation:
    """What trains `blocks` (None for another kind of encoder), whose activations are computed again if `recompute`.

    `autocast` is its dtype, None without autocast; the rest is as for `why_not_ours`.
    """
    if blocks is None:
        return Implementation("none", "the encoder is no transformer")
    elsewhere = why_not_ours(device=device, compiled=compiled)
    numbers = autocast or torch.float32
    reason = elsewhere or ("activations are recomputed" if recompute else None) or why_not_here(numbers) or _why_not(blocks)
    if reason is not None:
        return Implementation("torch", reason)
    products = "bfloat16 products, float32 sums" if numbers == torch.bfloat16 else "float32"
    return Implementation("cpp", f"C++, {best_engine(numbers)}, {products}")


def why_not_here(numbers: torch.dtype) -> str | None:
    """The reason why this machine or installation has no tower for training in that format; None if it has."""
    found = native()
    if found.module is None:
        return found.reason
    if best_engine(numbers):
        return None
    name = str(numbers).removeprefix("torch.")
    return f"no {name} products faster than torch's ({found.module.isa()})"


def best_engine(numbers: torch.dtype) -> str | None:
    """The instruction set that trains blocks in that format on this machine, given the extension; None if that does not pay."""
    return ENGINES.get(numbers, {}).get(native().module.isa())


def takes(blocks: nn.ModuleList, tokens: Tensor) -> bool:
    """Whether `run` is for this forward pass: training in a format that is covered on this CPU, and so are sizes and layout."""
    numbers = training_format(tokens)
    return (
        numbers is not None
        and tokens.dtype in (torch.float32, torch.bfloat16)
        and tokens.numel() > 0
        and why_not_here(numbers) is None
        and _why_not(blocks) is None
    )


def run(
    blocks: nn.ModuleList, tokens: Float[Tensor, "batch tokens width"], *, engine: str | None = None
) -> Float[Tensor, "batch tokens width"]:
    """The tokens after all blocks, of the same dtype; see `takes`. `engine` is for tests.

    The gradient's backward pass runs once per forward pass; a second one raises RuntimeError.
    """
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    numbers = training_format(tokens)
    engine = engine or (best_engine(numbers) if numbers else None)
    assert engine is not None
    sizes = sizes_of(blocks, tokens, threads=torch.get_num_threads(), engine=engine)
    result: Tensor = _Tower.apply(tokens.float(), sizes, *parameters)
    return result.to(tokens.dtype)


def free_workspace_bytes() -> int:
    """Of the memory that is kept for the next step."""
    return sum(workspace.memory.nbytes for workspace in _free)


def drop_free_workspaces() -> None:
    """Give that memory back."""
    _free.clear()


def sizes_of(blocks: nn.ModuleList, tokens: Tensor, *, threads: int, engine: str) -> Sizes:
    """Of a forward pass."""
    first = blocks[0]
    assert isinstance(first, Block)
    batch, count, _width = tokens.shape
    width, mlp_width, heads, pre_norm, activation = _description(first)
    return Sizes(
        batch=batch,
        tokens=count,
        width=width,
        mlp_width=mlp_width,
        heads=heads,
        depth=len(blocks),
        pre_norm=pre_norm,
        activation=activation,
        threads=threads,
        engine=engine,
    )


def _why_not(blocks: nn.ModuleList) -> str | None:
    """The reason why these blocks are not covered."""
    if not all(isinstance(block, Block) and block.training for block in blocks):
        return "not in training"
    described = {_description(block) for block in blocks if isinstance(block, Block)}
    if len(described) != 1:
        return "the blocks differ"
    width, mlp_width, heads, _pre_norm, _activation = described.pop()
    if width % (BLOCK * heads) or mlp_width % BLOCK:
        return f"the widths of a head ({width // heads}) and of the MLP ({mlp_width}) are not multiples of {BLOCK}"
    parts = [part for block in blocks for part in block.modules()]
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "a part of the blocks has hooks"
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    if not all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters):
        return "parameters are not float32 in one piece"
    return None


def _description(block: Block) -> tuple[int, int, int, bool, str]:
    """Width, MLP width, heads, norms before, and the activation's name; all in all, what blocks of a tower have in common."""
    inner = block.mlp[0]
    assert isinstance(inner, nn.Linear)
    activation = next(name for name, kind in ACTIVATIONS.items() if type(block.mlp[1]) is kind)
    return inner.in_features, inner.out_features, block.attention.heads, block.pre_norm, activation


class _Lease:
    """A workspace in use by a graph; given back after the backward pass, or when the graph is dropped without one."""

    def __init__(self, sizes: Sizes) -> None:
        self.workspace: Workspace | None = _take(sizes)

    def give_back(self) -> None:
        if self.workspace is not None:
            _free.append(self.workspace)
            self.workspace = None
            del _free[:-MOST_FREE]

    __del__ = give_back


def _take(sizes: Sizes) -> Workspace:
    for i, workspace in enumerate(_free):
        if workspace.sizes == sizes:
            return _free.pop(i)
    tower = native().module.tower
    memory = torch.empty(tower.workspace_bytes(sizes.engine, _shape(sizes), sizes.threads), dtype=torch.uint8)
    tower.prefer_huge_pages(memory)
    return Workspace(sizes, memory)


def _shape(sizes: Sizes) -> Any:
    named = sizes._asdict()
    del named["threads"], named["engine"]
    return native().module.tower.Shape(**named)


class _Tower(torch.autograd.Function):
    """All blocks, from float32 tokens to float32 tokens. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, sizes: Sizes, *parameters: Tensor) -> Tensor:
        ctx.lease = _Lease(sizes)
        memory = ctx.lease.workspace.memory
        ctx.save_for_backward(memory)  # so that whoever counts or moves what autograd keeps sees it
        ctx.shapes = [parameter.shape for parameter in parameters]
        result = torch.empty(tokens.shape)
        given = [parameter.detach() for parameter in parameters]
        entering = tokens.detach().contiguous()
        native().module.tower.forward(sizes.engine, sizes.threads, _shape(sizes), memory, entering, given, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lease.workspace is None:
            raise RuntimeError("this backward pass runs once per forward pass: it writes gradients over the activations")
        sizes = ctx.lease.workspace.sizes
        (memory,) = ctx.saved_tensors
        found, gradients = torch.empty(gradient.shape), [torch.empty(shape) for shape in ctx.shapes]
        leaving = gradient.float().contiguous()
        native().module.tower.backward(sizes.engine, sizes.threads, _shape(sizes), memory, leaving, found, gradients)
        ctx.lease.give_back()
        return found, None, *gradients
