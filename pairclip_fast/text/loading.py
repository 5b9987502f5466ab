"""The one place that calls `from_pretrained`: local files only, every weight accounted for, no chatter.

transformers fills weights that a checkpoint lacks with random numbers and only logs it. A silently random text tower
would train against noise, so here that is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pairclip_fast.errors import EnvironmentLackingError

BERT_POOLER = "pooler."
"""BERT's own pooler is not used by sentence encoders, so a checkpoint may well lack it."""


def load_model(model_class: Any, folder: Path, *, device: torch.device) -> Any:
    """`model_class` with the weights in `folder`, float32, frozen, in evaluation mode.

    Raises:
        EnvironmentLackingError: damaged files, or weights missing from them.
    """
    from safetensors import SafetensorError

    with _quiet():
        try:
            model, report = model_class.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise EnvironmentLackingError("cannot load the text encoder", where=folder, got=error, fix="fetch its files again") from error
    missing = sorted(key for key in (*report["missing_keys"], *map(str, report["mismatched_keys"])) if not key.startswith(BERT_POOLER))
    if missing:
        raise EnvironmentLackingError(
            "weights of the text encoder are missing",
            where=folder,
            expected=f"all weights of {model_class.__name__}",
            got=f"{len(missing)} missing, the first is {missing[0]}",
            fix="fetch its files again; for a CLIP text model without projection use --features pooled",
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        EnvironmentLackingError: damaged or unknown files.
    """
    with _quiet():
        try:
            return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare `Exception` on damaged files
            raise EnvironmentLackingError("cannot load the tokenizer", where=folder, got=error, fix="fetch its files again") from error


def text_device(name: str = "auto") -> torch.device:
    """Where captions are embedded: CUDA if there is any, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors, no progress bars; the process-wide settings are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
