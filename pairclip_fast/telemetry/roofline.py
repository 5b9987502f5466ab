"""The least time that a training step can take on a GPU, from its operations and the card's published peaks: an estimate.

Every operation of a step is counted on meta tensors: products as torch's FLOP counter counts them, and the bytes of what it
reads and writes. Each then takes at least the longer of computing and moving (Williams et al. 2009), and the optimizer moves its
state once. Launches, unfilled waves and the loader are not in it, so a real step is slower; kernels that fuse operations can
be faster. The published peaks are never reached.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pairclip_fast.gpus import Gpu
from pairclip_fast.kernels import ops
from pairclip_fast.models.encoder import ImageEncoder

ADAM_TRAFFIC_BYTES = 28
"""Per parameter: weight, gradient and two moments read, weight and moments written, in float32."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One operation."""

    flops: float
    bytes: float


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the work of every operation that is not a mere view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            formula: Callable[..., float] | None = flop_registry.get(func._overloadpacket)
            flops = float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0
            moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
            self.work.append(Work(flops, moved))
        return out


def step_work(model: nn.Module, *, image_shape: tuple[int, int, int], num_captions: int, batch_size: int, dtype: torch.dtype) -> list[Work]:
    """The operations of one forward and backward pass, everything in `dtype`.

    Args:
        model: A `PairEncoder`; it is copied to the meta device and not touched.
        image_shape: Channels, height and width of the stacked picture.
        num_captions: Captions in the loss; 0 to leave it out.
        batch_size: Pairs.
        dtype: Of weights and activations; a little less traffic than autocast's, which keeps some of them in float32.
    """
    shadow = copy.deepcopy(model).to("meta", dtype=dtype).train()
    for part in shadow.modules():
        if isinstance(part, ImageEncoder):
            part.recompute = False
    recorder = _Recorder()
    with recorder:
        features = shadow(torch.empty(batch_size, *image_shape, device="meta", dtype=dtype))
        if num_captions:
            bank = torch.empty(num_captions, features.shape[1], device="meta", dtype=features.dtype)
            features = ops.bank_softmax(features, bank, torch.ones((), device="meta", dtype=features.dtype))[0]
        features.sum().backward()
    return recorder.work


def least_seconds(work: list[Work], gpu: Gpu, *, parameters: int) -> float:
    """Least time of a step with this work, the optimizer's included."""
    flops_s, bytes_s = gpu.tflops * 1e12, gpu.bandwidth_gb_s * 1e9
    return sum(max(one.flops / flops_s, one.bytes / bytes_s) for one in work) + ADAM_TRAFFIC_BYTES * parameters / bytes_s
