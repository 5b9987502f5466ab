"""Published peaks of some GPUs, for estimates only: nothing here was measured by us. No imports, so that any room can use it.

Matrix rates are dense (without 2:4 sparsity) and with float32 accumulation, which is how torch multiplies: on GeForce cards
half of the advertised rate. Where the vendor prints a rate for the full-rate accumulation only, it follows from units and clock,
as noted.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One card of the reference design."""

    name: str
    capability: tuple[int, int]
    tflops: float
    """Dense, in the fastest format that training may use: bfloat16, float16 before Ampere, float32 before tensor cores."""
    matrix_format: str
    """That format, as `Precision` names it."""
    tf32_tflops: float | None = None
    """Dense, for float32 on tensor cores; None where they have no TF32."""
    bandwidth_gb_s: float
    memory_gib: int
    processors: int
    """Streaming multiprocessors."""
    source: str


GPUS = (
    Gpu(
        name="GTX 1060",
        capability=(6, 1),
        tflops=4.4,
        matrix_format="fp32",
        bandwidth_gb_s=192,
        memory_gib=6,
        processors=10,
        source="GeForce GTX 1060 6GB specifications: 1,280 cores x 2 x 1.708 GHz; float16 runs at 1/64 of it",
    ),
    Gpu(
        name="RTX 2080",
        capability=(7, 5),
        tflops=40.3,
        matrix_format="fp16",
        bandwidth_gb_s=448,
        memory_gib=8,
        processors=46,
        source="NVIDIA Turing architecture whitepaper (2018): 368 tensor cores x 128 x 1.71 GHz = 80.5, halved for float32 accumulation",
    ),
    Gpu(
        name="RTX 3080",
        capability=(8, 6),
        tflops=59.5,
        matrix_format="bf16",
        tf32_tflops=29.8,
        bandwidth_gb_s=760,
        memory_gib=10,
        processors=68,
        source="NVIDIA GA102 whitepaper (2020): 272 tensor cores x 256 x 1.71 GHz = 119, halved for float32 accumulation",
    ),
    Gpu(
        name="RTX 3090",
        capability=(8, 6),
        tflops=71,
        matrix_format="bf16",
        tf32_tflops=35.6,
        bandwidth_gb_s=936,
        memory_gib=24,
        processors=82,
        source="NVIDIA GA102 whitepaper (2020)",
    ),
    Gpu(
        name="RTX 4090",
        capability=(8, 9),
        tflops=165.2,
        matrix_format="bf16",
        tf32_tflops=82.6,
        bandwidth_gb_s=1008,
        memory_gib=24,
        processors=128,
        source="NVIDIA Ada GPU architecture whitepaper (2022)",
    ),
    Gpu(
        name="L4",
        capability=(8, 9),
        tflops=121,
        matrix_format="bf16",
        tf32_tflops=60.5,
        bandwidth_gb_s=300,
        memory_gib=24,
        processors=58,
        source="NVIDIA L4 data sheet, halved: it gives rates with 2:4 sparsity",
    ),
    Gpu(
        name="A100",
        capability=(8, 0),
        tflops=312,
        matrix_format="bf16",
        tf32_tflops=156,
        bandwidth_gb_s=2039,
        memory_gib=80,
        processors=108,
        source="NVIDIA A100 data sheet, SXM 80 GB",
    ),
    Gpu(
        name="H100",
        capability=(9, 0),
        tflops=989.4,
        matrix_format="bf16",
        tf32_tflops=494.7,
        bandwidth_gb_s=3350,
        memory_gib=80,
        processors=132,
        source="NVIDIA H100 data sheet, SXM5",
    ),
    Gpu(
        name="H200",
        capability=(9, 0),
        tflops=989.4,
        matrix_format="bf16",
        tf32_tflops=494.7,
        bandwidth_gb_s=4800,
        memory_gib=141,
        processors=132,
        source="NVIDIA H200 data sheet, SXM",
    ),
)


def find_gpu(name: str) -> Gpu | None:
    """The card for a device name as torch gives it; None if it is not here."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in GPUS if all(word in words for word in gpu.name.split())), None)
