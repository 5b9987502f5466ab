"""Which number format the forward pass runs in: what was asked for, bounded by what the device computes natively.

Support means instructions that are faster than float32's, not an API that returns without error: bfloat16 is slower than float32
where it is emulated, and on Intel cores that have its vector instruction without the matrix unit.
Weights, optimizer state, and every sum of loss and softmax stay in float32 in every mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import torch

from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.machine import cpu_vendor

AMPERE = (8, 0)
"""First compute capability with bfloat16 tensor cores."""
VOLTA = (7, 0)
"""First compute capability with tensor cores; before it, most cards compute float16 at 1/64 of float32's rate."""

INTEL = "GenuineIntel"
"""What Intel's processors answer when asked for their maker."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """The chosen format and the reason for it."""

    name: Literal["fp32", "bf16", "fp16"]
    device_type: str
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    @property
    def loss_dtype(self) -> torch.dtype:
        """What the loss multiplies with the caption bank: bfloat16, or float32, since float16 has no range for gradients unscaled."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; passes everything through otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(device: torch.device, *, amp: bool, events: EventLog) -> Precision:
    """The fastest format that `device` computes natively, if `amp` asks for it.

    CUDA: bf16 from compute capability 8.0 on, fp16 with loss scaling from 7.0 on, else fp32. CPU: bf16 where `cpu_bf16_feature` finds
    instructions that pay, else fp32 with a fallback event.
    """
    if not amp:
        return Precision("fp32", device.type, "--amp not given")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        words = f"compute capability {capability[0]}.{capability[1]}"
        if capability < VOLTA:
            events.fallback("--amp", chosen="fp32", reason=f"no tensor cores, and slow float16 ({words})")
            return Precision("fp32", "cuda", f"no tensor cores ({words})")
        if capability >= AMPERE and torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "cuda", words)
        events.fallback("--amp", chosen="fp16 with loss scaling", reason=f"no bfloat16 tensor cores ({words})")
        return Precision("fp16", "cuda", words)
    feature = cpu_bf16_feature()
    if feature is not None:
        return Precision("bf16", device.type, feature)
    has_vectors = torch.cpu._is_avx512_bf16_supported()
    lacking = "AVX-512 BF16 without AMX is slower than float32 on Intel" if has_vectors else "emulated bfloat16 is slower than float32"
    events.fallback("--amp", chosen="fp32", reason=f"no bfloat16 instructions that pay on this CPU: {lacking}")
    return Precision("fp32", device.type, lacking)


def cpu_bf16_feature() -> str | None:
    """Name of the CPU's bfloat16 instructions, or None if it has none that beat float32's.

    AMX multiplies several times as fast as float32. AVX-512 BF16's `VDPBF16PS` does twice the work of a float32 multiply-add. On an
    Emerald Rapids whose AMX was masked it took four times as long as one: a step of `vit` took 1.6 times as long as in float32
    (`benchmarks/records/train-step-avx512-bf16-cpu.json`). On AMD's Zen 5 it takes no longer than one: plain torch's
    step of `enhanced` took a third of float32's time, that of `vit` as long (`benchmarks/records/train-step-amd-cpu.json`).
    """
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() and cpu_vendor() != INTEL else None
