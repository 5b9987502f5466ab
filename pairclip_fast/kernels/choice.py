"""Which implementation of the bank operations runs, and why.

Each device type has one implementation of our own; where it cannot run, or does not cover a shape or dtype, the blocked
torch operations of `portable` take over. `PAIRCLIP_BACKEND` forces a choice: `torch`, or a name from `CANDIDATES`, which
is then an error where it cannot run instead of a fallback.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from pairclip_fast.errors import ConfigError, EnvironmentLackingError
from pairclip_fast.kernels import portable

VARIABLE = "PAIRCLIP_BACKEND"
CANDIDATES = {"cpu": ("cpp", "pairclip_fast.kernels.cpp"), "cuda": ("triton", "pairclip_fast.kernels.triton_cuda")}
"""Per device type: name and module of our own implementation."""


class Implementation(NamedTuple):
    """What runs the bank operations, or a part of a model in training, and why."""

    name: str
    reason: str


@runtime_checkable
class Kernels(Protocol):
    """The four operations; arguments are checked already, and outside autocast. See `reference` for what they compute."""

    def bank_softmax(self, emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]: ...
    def bank_stats(
        self, emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def pair_scores(self, emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor: ...
    def bank_topk(self, emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class OwnKernels(Kernels, Protocol):
    """A module of `CANDIDATES`."""

    def why_not(self, device: torch.device, *, dtype: torch.dtype, dim: int) -> str | None:
        """The reason why it cannot run on `device` for `dim` features of that dtype; None if it can. May check itself against torch."""

    def describe(self, device: torch.device) -> str:
        """What exactly runs on `device`: instruction set, tiles, precision."""

    def covers(self, emb: Tensor, bank: Tensor) -> bool:
        """Whether it was made for this dtype, layout and number of captions; otherwise the call goes to `portable`."""


def kernels_for(emb: Tensor, bank: Tensor) -> Kernels:
    """The implementation for these arguments."""
    own = _resolve(emb.device, os.environ.get(VARIABLE, "auto"), dtype=emb.dtype, dim=emb.shape[1])[1]
    return own if own is not None and own.covers(emb, bank) else cast(Kernels, portable)


def implementation(device: torch.device, *, dtype: torch.dtype, dim: int) -> Implementation:
    """Name of the implementation that runs on `device` for `dim` features of that dtype, and the reason.

    Raises:
        ConfigError: `PAIRCLIP_BACKEND` names no implementation.
        EnvironmentLackingError: it names one that cannot run here.
    """
    return _resolve(device, os.environ.get(VARIABLE, "auto"), dtype=dtype, dim=dim)[0]


def implementation_of_all(device: torch.device, *, dtypes: Sequence[torch.dtype], dim: int) -> Implementation:
    """As `implementation`, of features in each of these dtypes: our own only if it takes all of them."""
    found = [implementation(device, dtype=dtype, dim=dim) for dtype in dtypes]
    return next((one for one in found if one.name == "torch"), found[0])


@functools.cache
def _resolve(device: torch.device, wanted: str, *, dtype: torch.dtype, dim: int) -> tuple[Implementation, OwnKernels | None]:
    names = {"auto", "torch", *(name for name, _module in CANDIDATES.values())}
    if wanted not in names:
        raise ConfigError("unknown implementation of the kernels", where=VARIABLE, expected=", ".join(sorted(names)), got=wanted)
    if wanted == "torch":
        return Implementation("torch", f"{VARIABLE}=torch"), None
    if device.type not in CANDIDATES:
        return Implementation("torch", f"there is no kernel of our own for {device.type}"), None
    name, module_name = CANDIDATES[device.type]
    module = cast(OwnKernels, importlib.import_module(module_name))
    if wanted in ("auto", name):
        reason = module.why_not(device, dtype=dtype, dim=dim)
    else:
        reason = f"{VARIABLE}={wanted}, which is not for {device.type}"
    if reason is None:
        return Implementation(name, module.describe(device)), module
    if wanted == name:
        raise EnvironmentLackingError(f"the {name} kernels cannot run", where=f"{VARIABLE}={wanted}", got=reason, fix=f"unset {VARIABLE}")
    return Implementation("torch", reason), None
