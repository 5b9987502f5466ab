"""Tensor files of checkpoints: safetensors, checked by our own eyes before any tensor is made.

A checkpoint may come from anywhere. The header is bounded, parsed as JSON without duplicate keys, and must account for
every byte of the file exactly once; only then does the safetensors library see it. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

HEADER_LIMIT_BYTES = 4 << 20
"""About 40,000 tensors; our largest model has 120."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class DamagedError(Exception):
    """A file of a checkpoint is not what it should be. Internal: becomes an event or a `CheckpointError`."""


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The tensors as one safetensors file, from whatever device and memory layout."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors in a file, without reading the tensors.

    Raises:
        DamagedError: not a safetensors file, a header that is too large or malformed, or offsets that overlap, leave gaps
            or point outside.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
            raise DamagedError(f"{path.name}: not a safetensors file (header of {length:,} bytes in a file of {size:,})")
        header = _parse(file.read(length), path)
    entries = {name: _entry(name, value) for name, value in header.items() if name != "__metadata__"}
    position = 0
    for begin, end, spec in sorted(entries.values(), key=lambda entry: entry[:2]):
        if begin != position or end - begin != math.prod(spec.shape) * spec.dtype.itemsize:
            raise DamagedError(f"{path.name}: tensor offsets overlap, leave gaps or contradict the shapes")
        position = end
    if position != size - 8 - length:
        raise DamagedError(f"{path.name}: {position:,} bytes of tensors described, {size - 8 - length:,} present")
    return {name: spec for name, (_, _, spec) in entries.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        DamagedError: see `read_header`; also a value that is not finite.
    """
    read_header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{path.name}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedError(f"{path.name}: {name} holds values that are not finite")
    return tensors


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path.name}: malformed header: {error}") from error
    if not isinstance(header, dict):
        raise DamagedError(f"{path.name}: the header is no table")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _entry(name: str, value: Any) -> tuple[int, int, TensorSpec]:
    """(begin, end, spec) of one header entry."""
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 8:
            whole = all(type(number) is int and 0 <= number < 2**48 for number in (*shape, *offsets))
            if whole and isinstance(dtype, str) and dtype in DTYPES:
                return offsets[0], offsets[1], TensorSpec(tuple(shape), DTYPES[dtype])
    raise DamagedError(f"malformed header entry for tensor {name[:80]!r}")
