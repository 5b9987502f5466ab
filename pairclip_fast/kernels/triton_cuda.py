"""The bank operations on CUDA: which Triton kernel runs with which tile, and the check that it computes what torch computes.

Nobody could run these kernels on the GPU they now meet. So the first use of each combination of device, dtype and number of
features computes a small case with them and with torch; a compile error, a lack of shared memory or a wrong number hands that
combination to torch, with the reason, instead of ending or spoiling a run. The check compiles the kernels that the run needs
anyway. Triton is imported when first used, never by importing this module.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from typing import cast

import torch
from torch import Tensor

from pairclip_fast.kernels import tiles
from pairclip_fast.kernels.choice import Kernels
from pairclip_fast.kernels.selfcheck import comparisons, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
USUAL = (torch.float32, 512)
"""What the trainer hands in: features outside autocast, of CLIP's size. `why_not` answers for these."""
ALIGNMENT = 16
"""Bytes; the compiler is told that rows start at multiples of this."""
MOST_CAPTIONS = 2**30
"""Column numbers have 32 bits and may run past the end by one tile of sampled captions."""
CHECK_ROWS, CHECK_CAPTIONS = 64, 4_400
"""Enough captions for several splits of the bank and for the candidate lists of `bank_topk`"""


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`; None if they run and agree with torch there."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < tiles.OLDEST_CAPABILITY:
        return f"compute capability {_dotted(capability)}: Triton uses tensor cores from {_dotted(tiles.OLDEST_CAPABILITY)} on"
    return failure(device, *USUAL)


def describe(device: torch.device) -> str:
    """Architecture and precision."""
    capability = torch.cuda.get_device_capability(device)
    known = "" if capability in tiles.SHARED_MEMORY_KIB else ", an architecture without tiles of its own"
    return f"compute capability {_dotted(capability)}{known}; ranks of float32 features from three TF32 products"


def covers(emb: Tensor, bank: Tensor) -> bool:
    """Shapes and layouts the kernels are compiled for; whether they work with this dtype and size is found out at first use."""
    if emb.dtype not in DTYPES or emb.shape[1] == 0 or emb.shape[1] % tiles.STEP_OF_DIM or bank.shape[0] > MOST_CAPTIONS:
        return False
    return _aligned(bank) and usable(emb.device, emb.dtype, emb.shape[1])


def bank_softmax(emb: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference`; float32 products follow `torch.set_float32_matmul_precision`."""
    from pairclip_fast.kernels import triton_softmax

    precision = tiles.softmax_precision(emb.dtype)
    tile = tiles.softmax_tile(_capability(emb), dtype=emb.dtype, dim=emb.shape[1], precision=precision)
    programs = -(-emb.shape[0] // tile.rows) * -(-emb.shape[1] // tile.slice)
    splits = tiles.split_bank(bank.shape[0], columns=tile.columns, programs=programs, processors=_processors(emb))
    with torch.cuda.device(emb.device):
        return triton_softmax.bank_softmax(_rows(emb), bank, scale, tile=tile, splits=splits, precision=precision)


def bank_stats(emb: Tensor, bank: Tensor, scale: Tensor, targets: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference`."""
    from pairclip_fast.kernels import triton_stats

    tile = tiles.stats_tile(_capability(emb), dtype=emb.dtype, dim=emb.shape[1])
    pair_tile = tiles.pair_tile(dtype=emb.dtype, dim=emb.shape[1])
    programs = -(-emb.shape[0] // tile.rows)
    splits = tiles.split_bank(bank.shape[0], columns=tile.columns, programs=programs, processors=_processors(emb))
    with torch.cuda.device(emb.device):
        return triton_stats.bank_stats(_rows(emb), bank, scale, targets, groups, tile=tile, pair_tile=pair_tile, splits=splits)


def pair_scores(emb: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    """See `reference`."""
    from pairclip_fast.kernels import triton_scores

    with torch.cuda.device(emb.device):
        return triton_scores.pair_scores(_rows(emb), bank, indices, tile=tiles.pair_tile(dtype=emb.dtype, dim=emb.shape[1]))


def bank_topk(emb: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference`."""
    from pairclip_fast.kernels import triton_topk

    tile = tiles.topk_tile(dtype=emb.dtype, dim=emb.shape[1])
    with torch.cuda.device(emb.device):
        return triton_topk.bank_topk(_rows(emb), bank, k, tile=tile, processors=_processors(emb))


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernels agree with torch for this dtype and size; the one warning if they do not."""
    reason = failure(device, dtype, dim)
    if reason is not None:
        warnings.warn(f"features of {dim} {dtype} on {device} go to torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


@functools.cache
def failure(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """What goes wrong in a small case; None if nothing does."""
    try:
        case = make_case(device=device, dtype=dtype, batch=CHECK_ROWS, captions=CHECK_CAPTIONS, dim=dim)
        for found in comparisons(cast(Kernels, sys.modules[__name__]), case):
            if not found.ok:
                return f"self-check: {found.operation}'s {found.output} is off by {found.worst:.2g}, {found.allowed:.2g} allowed"
    except Exception as error:  # noqa: BLE001 - compiler, driver and launcher fail with classes of their own; all mean the same
        return f"self-check: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _aligned(rows: Tensor) -> bool:
    stride = rows.stride(0) * rows.element_size()
    return rows.stride(1) == 1 and stride % ALIGNMENT == 0 and rows.data_ptr() % ALIGNMENT == 0


def _rows(emb: Tensor) -> Tensor:
    """Embeddings in the layout the kernels are compiled for; a batch is small enough to copy."""
    return emb if _aligned(emb) else emb.clone(memory_format=torch.contiguous_format)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
