"""Products that are computed in the format they are given in, whatever the training around them allows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def outside_autocast(device: torch.device) -> torch.autocast:
    """An op's body still sees the caller's autocast, which would round the scores to bfloat16."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 products that are float32: TF32, which training allows on CUDA, has 10 bits. Scores would tie at
    random, and captions would depend on which command embedded them."""
    restore = _float32_products()
    torch.set_float32_matmul_precision("highest")
    try:
        with outside_autocast(device):
            yield
    finally:
        restore()


def _float32_products() -> Callable[[], None]:
    """What brings torch's switch of float32 products back to where it is now. It has two: the old one cannot be read once the
    new ones were set, and the new ones must not be set where the old one is in use."""
    try:
        return functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    except RuntimeError:
        switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        return functools.partial(_set_switches, {switch: switch.fp32_precision for switch in switches})


def _set_switches(values: dict[Any, str]) -> None:
    for switch, value in values.items():
        switch.fp32_precision = value
