"""The bank operations on CUDA: which Triton kernel runs with which tile, and the check that it computes what torch computes.

Nobody could run these kernels on the GPU they now meet. So the first use of each combination of device, dtype and number of
features computes a small case with them and with torch; a compile error, a lack of shared memory or a wrong number hands that
combination to torch, with the reason, instead of ending or spoiling a run. The check compiles the kernels that the run needs
anyway. Triton is imported when first used, never by importing this module.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from pairclip_fast.kernels import portable, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
USUAL = (torch.float32, 512)
"""What the trainer hands in: features outside autocast, of CLIP's size. `why_not` answers for these."""
ALIGNMENT = 16
"""Bytes; the compiler is told that rows start at multiples of this."""
MOST_CAPTIONS = 2**31 - 1024
"""Column numbers are 32-bit and may run past the end by one tile."""
CHECK_ROWS, CHECK_CAPTIONS, CHECK_TOP = 64, 300, 10
CHECK_SCALE = 20.0
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference of log-partitions and means in the self-check: room for TF32 and for weights rounded to the inputs'
dtype, far below what a wrong kernel does."""
SCORE_TOLERANCE = 2e-6
"""The same for scores of normalised features, always of float32's grade."""


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
        for name, got, want, tolerance in _small_case(device, dtype, dim):
            worst = float((got.double() - want.double()).abs().max())
            if not worst <= tolerance:
                return f"{name} is off by {worst:.2g} in the self-check, {tolerance:.2g} allowed"
    except Exception as error:  # noqa: BLE001 - compiler, driver and launcher fail with classes of their own; all mean the same
        return f"self-check: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _small_case(device: torch.device, dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, result, expectation and tolerance of every output, one operation after the other."""
    generator = torch.Generator().manual_seed(0)
    emb, bank = (torch.randn(rows, dim, generator=generator).to(device, dtype) for rows in (CHECK_ROWS, CHECK_CAPTIONS))
    emb, bank = (torch.nn.functional.normalize(tensor, dim=1) for tensor in (emb, bank))
    bank[-CHECK_ROWS:] = bank[:CHECK_ROWS]  # ties
    scale = torch.tensor(CHECK_SCALE, device=device)
    targets = torch.arange(CHECK_ROWS, device=device)
    groups = torch.arange(CHECK_CAPTIONS, device=device) // 2
    wide, wide_bank, wide_scale = emb.double(), bank.double(), scale.double()
    tolerance = TOLERANCE[dtype]

    lse, mean = bank_softmax(emb, bank, scale)
    want_lse, want_mean = portable.bank_softmax(wide, wide_bank, wide_scale)
    yield "bank_softmax's log-partition", lse, want_lse, tolerance
    yield "bank_softmax's mean", mean, want_mean, tolerance
    scores = wide @ wide_bank.T
    chosen = targets[:, None] + torch.arange(3, device=device)
    yield "pair_scores", pair_scores(emb, bank, chosen), scores.gather(1, chosen), SCORE_TOLERANCE
    best, places = bank_topk(emb, bank, CHECK_TOP)
    yield "bank_topk's scores", best, scores.topk(CHECK_TOP, dim=1).values, SCORE_TOLERANCE
    yield "bank_topk's indices", best, scores.gather(1, places), SCORE_TOLERANCE
    for label, given in (("", None), (" with groups", groups)):
        lse, positive, greater, equal = bank_stats(emb, bank, scale, targets, given)
        want = portable.bank_stats(wide, wide_bank, wide_scale, targets, given)
        yield f"bank_stats' log-partition{label}", lse, want[0], tolerance
        yield f"bank_stats' positive{label}", positive, want[1], SCORE_TOLERANCE
        # Scores within a rounding of each other may change places; whole columns lost or counted twice may not.
        near = ((scores - want[1][:, None]).abs() <= SCORE_TOLERANCE).sum(dim=1)
        strays = ((greater - want[2]).abs() > near) | ((greater + equal - want[2] - want[3]).abs() > near)
        yield f"bank_stats' counts{label}", strays, torch.zeros_like(strays), 0.0


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
