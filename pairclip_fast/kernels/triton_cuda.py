"""The bank operations on CUDA: which Triton kernel runs with which tile, and the check that it computes what torch computes.

Nobody could run these kernels on the GPU they now meet. So the first use of each combination of device, dtype and number of
features computes small cases with them and with torch; a compile error, a lack of shared memory or a wrong number hands that
combination to torch, with the reason, instead of ending or spoiling a run. Most of what the check compiles the run needs
anyway. Triton is imported when first used, never by importing this module.

The kernels want features in multiples of 64 and rows that start at multiples of 16 bytes. Others get zeros behind them, which
change no dot product; a bank's wider copy is made once and kept as long as the bank.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pairclip_fast.errors import EnvironmentLackingError, one_line
from pairclip_fast.kernels import tiles
from pairclip_fast.kernels.choice import Kernels
from pairclip_fast.kernels.selfcheck import comparisons, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes; the compiler is told that rows start at multiples of this."""
MOST_CAPTIONS = 2**30
"""Column numbers have 32 bits and may run past the end by one tile of sampled captions."""
CHECKED_SIZES = ((131, 4_403), (3, 203))
"""Rows and captions: several blocks of rows, splits of the bank and lists of candidates, all with a rest; and a bank so small that
`bank_topk` sorts it whole."""
_widened_banks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Wider copies by their bank, each with the version of the bank that it was made from."""


def why_not(device: torch.device, *, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernels do not run on `device`; None if they run and agree with torch there, for features of that kind."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < tiles.OLDEST_CAPABILITY:
        return f"compute capability {_dotted(capability)}: Triton uses tensor cores from {_dotted(tiles.OLDEST_CAPABILITY)} on"
    return failure(device, dtype, tiles.width(dim)) if dtype in DTYPES and dim else None


def describe(device: torch.device) -> str:
    """Architecture and precision."""
    capability = torch.cuda.get_device_capability(device)
    known = "" if capability in tiles.SHARED_MEMORY_KIB else ", an architecture without tiles of its own"
    return f"compute capability {_dotted(capability)}{known}; float32 as three TF32 products"


def covers(emb: Tensor, bank: Tensor) -> bool:
    """Dtypes and sizes the kernels are compiled for."""
    return emb.dtype in DTYPES and emb.shape[1] > 0 and bank.shape[0] <= MOST_CAPTIONS


def bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference`."""
    from pairclip_fast.kernels import triton_softmax

    dim = emb.shape[1]
    emb, bank = widened(emb, bank)
    tile = tiles.softmax_tile(_capability(emb), dtype=emb.dtype, dim=emb.shape[1])
    programs = -(-emb.shape[0] // tile.rows) * -(-emb.shape[1] // tile.slice)
    splits = tiles.split_bank(bank.shape[0], columns=tile.columns, programs=programs, processors=_processors(emb))
    with torch.cuda.device(emb.device):
        lse, mean = triton_softmax.bank_softmax(emb, bank, scale, tile=tile, splits=splits)
    return lse, mean[:, :dim].contiguous()


def bank_stats(emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference`."""
    from pairclip_fast.kernels import triton_stats

    emb, bank = widened(emb, bank)
    tile = tiles.stats_tile(_capability(emb), dtype=emb.dtype)
    pair_tile = tiles.pair_tile(dtype=emb.dtype)
    programs = -(-emb.shape[0] // tile.rows)
    splits = tiles.split_bank(bank.shape[0], columns=tile.columns, programs=programs, processors=_processors(emb))
    with torch.cuda.device(emb.device):
        return triton_stats.bank_stats(emb, bank, scale, targets, groups, tile=tile, pair_tile=pair_tile, splits=splits)


def pair_scores(emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    """See `reference`."""
    from pairclip_fast.kernels import triton_scores

    emb, bank = widened(emb, bank)
    with torch.cuda.device(emb.device):
        return triton_scores.pair_scores(emb, bank, indices, tile=tiles.pair_tile(dtype=emb.dtype))


def bank_topk(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference`."""
    from pairclip_fast.kernels import triton_topk

    emb, bank = widened(emb, bank)
    tile = tiles.topk_tile(dtype=emb.dtype)
    with torch.cuda.device(emb.device):
        return triton_topk.bank_topk(emb, bank, k, tile=tile, processors=_processors(emb))


def widened(emb: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the layout and with the number of features that the kernels are compiled for; what fits already, unchanged."""
    width = tiles.width(emb.shape[1])
    if not _fits(emb, width):
        emb = _with_zeros(emb, width)
    if not _fits(bank, width):
        if bank.is_inference():  # nobody would notice a change of it
            return emb, _with_zeros(bank, width)
        version, wide = _widened_banks.get(bank, (None, bank))  # type: ignore[no-untyped-call]
        if version != bank._version:
            wide = _with_zeros(bank, width)
            if wide.is_cuda:  # others may use it on other streams
                torch.cuda.current_stream(wide.device).synchronize()
            _widened_banks[bank] = (bank._version, wide)
        bank = wide
    return emb, bank


@functools.cache
def failure(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """What goes wrong in small cases, which is also a warning; None if nothing does.

    Raises:
        EnvironmentLackingError: the kernels left the GPU unusable, for torch too.
        torch.OutOfMemoryError: there is no room for them; that is no fault of theirs.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first use of the kernels compiles and checks them: call the operation once before capturing a CUDA graph")
    reason = _difference(device, dtype, dim)
    if reason is not None:
        warnings.warn(f"features of {dim} {dtype} on {device} go to torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _difference(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    try:
        for batch, captions in CHECKED_SIZES:
            case = make_case(device=device, dtype=dtype, batch=batch, captions=captions, dim=dim)
            for found in comparisons(cast(Kernels, sys.modules[__name__]), case):
                if not found.ok:
                    return f"self-check: {found.operation}'s {found.output} is off by {found.worst:.2g}, {found.allowed:.2g} allowed"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compiler, driver and launcher fail with classes of their own; all mean the same
        reason = f"self-check: {one_line(error)}"
        _refuse_a_broken_device(device, reason)
        return reason
    return None


def _refuse_a_broken_device(device: torch.device, reason: str) -> None:
    """After an illegal access every later call fails, whoever makes it: torch cannot take over in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        fix = "run again with PAIRCLIP_BACKEND=torch, and please report this"
        raise EnvironmentLackingError("the Triton kernels left the GPU unusable", where=device, got=reason, fix=fix) from error


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _fits(rows: Tensor, width: int) -> bool:
    stride = rows.stride(0) * rows.element_size()
    return rows.shape[1] == width and rows.stride(1) == 1 and stride % ALIGNMENT == 0 and rows.data_ptr() % ALIGNMENT == 0


def _with_zeros(rows: Tensor, width: int) -> Tensor:
    if rows.shape[1] == width:
        return rows.clone(memory_format=torch.contiguous_format)
    return F.pad(rows.detach(), (0, width - rows.shape[1])).contiguous()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
