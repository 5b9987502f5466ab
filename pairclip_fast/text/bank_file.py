"""The caption bank as a file: safetensors with text metadata, written atomically, checked when read.

The metadata says what the features are and from what they were made; a digest of the tensor bytes finds damage that the
format itself does not notice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pairclip_fast.errors import DataError
from pairclip_fast.storage import REAL, FileSystem, write_atomic

FORMAT = "1"
REQUIRED = ("format", "kind", "encoder", "model", "digest", "features", "template", "class_names", "captions", "tensors_sha256")
HEADER_LENGTH_BYTES = 8
UNIT_TOLERANCE = 1e-4
"""How far a stored norm may be from 1: other programs may write banks from half-precision features."""


def write_bank_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, fs: FileSystem = REAL) -> None:
    """Write tensors and metadata; the same values give the same bytes."""
    import safetensors.torch

    complete = {**metadata, "format": FORMAT, "tensors_sha256": _digest(tensors)}
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=complete)
    write_atomic(path, _with_sorted_header(data), fs=fs)


def read_bank_file(path: Path, *, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a whole bank file.

    Args:
        path: The file.
        fix: The command that makes it anew, for the error message.

    Raises:
        DataError: missing, truncated, changed, or without the metadata that a bank has.
    """
    import safetensors
    import safetensors.torch

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
        # Loaded from bytes, not mapped: replacing the file later must not pull the features from under a run.
        tensors = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError("there is no caption bank", where=path, fix=fix) from error
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError("the caption bank is damaged", where=path, got=error, fix=fix) from error
    absent = [name for name in REQUIRED if name not in metadata]
    if absent:
        raise DataError(
            "the caption bank lacks metadata", where=path, expected=", ".join(REQUIRED), got=f"no {', no '.join(absent)}", fix=fix
        )
    if metadata["format"] != FORMAT:
        raise DataError("the caption bank has another format version", where=path, expected=FORMAT, got=metadata["format"], fix=fix)
    if _digest(tensors) != metadata["tensors_sha256"]:
        raise DataError(
            "the caption bank's features were changed", where=path, expected=metadata["tensors_sha256"], got=_digest(tensors), fix=fix
        )
    return tensors, metadata


def check_features(features: Tensor, *, count: int, where: object, fix: str) -> None:
    """Shape, dtype, finiteness and unit norm of a bank's features.

    Raises:
        DataError: one of these does not hold.
    """
    if features.ndim != 2 or features.dtype != torch.float32 or features.shape[0] != count or features.shape[1] < 1:
        got = f"{features.dtype} {tuple(features.shape)}"
        raise DataError("the text features have the wrong shape", where=where, expected=f"float32 ({count}, dim)", got=got, fix=fix)
    norms = features.norm(dim=1)
    wrong = ~((norms - 1).abs() <= UNIT_TOLERANCE)  # True for NaN too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        got = f"norm {float(norms[row]):g} in row {row} ({int(wrong.sum())} such rows)"
        raise DataError("the text features are not finite unit vectors", where=where, expected="norm 1", got=got, fix=fix)


def text_list(text: str, *, where: Path, name: str, fix: str) -> tuple[str, ...]:
    """A JSON list of strings from the metadata.

    Raises:
        DataError: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"the caption bank's {name} is not a list of texts", where=where, got=text, fix=fix)
    return tuple(value)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_sorted_header(data: bytes) -> bytes:
    """safetensors writes metadata in the order of a randomised hash map; sorted, equal banks are equal files."""
    length = int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    end = HEADER_LENGTH_BYTES + length
    header = json.dumps(json.loads(data[HEADER_LENGTH_BYTES:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % HEADER_LENGTH_BYTES)
    return len(header).to_bytes(HEADER_LENGTH_BYTES, "little") + header + data[end:]
