"""Every Triton kernel compiled for every architecture it is written for, and what the compiled code says. No GPU needed.

What can be read without running: registers and spills, shared and tensor memory, whether there is a body at all (a kernel that
needs too much tensor memory compiles without complaint to a single trap), whether tensor cores are used, and whether warps
compute the same products twice. Each figure has a bar; a cell that breaks one is printed and the exit code is 1. How fast a
kernel runs is not in here: not measured.

The signatures are not written down a second time: the product's own launchers run on meta tensors while their launches are
recorded, so a cell is what runs. All cells take 10 to 20 minutes on one core; --only selects some by substring.

    python benchmarks/kernel_matrix.py                  compile all, compare with the bars, write benchmarks/records/kernel-matrix.*
    python benchmarks/kernel_matrix.py --only 9.0,stats
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from markdown_table import markdown_table
from timing import write_record
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pairclip_fast.kernels import tiles, triton_scores, triton_softmax, triton_stats, triton_topk

RECORD = Path(__file__).parent / "records" / "kernel-matrix.json"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {**DTYPES, torch.int32: "i32", torch.int64: "i64"}
USUAL_DIM, OTHER_DIMS = 512, (256, 384, 768)
TENSOR_MEMORY_COLUMNS = 512
MOST_REDUNDANCY = 1.05
KNOWN_REDUNDANCY = {"9.0 softmax_kernel": 2.0}
"""Triton 3.8 gives a product that feeds another one whole rows per warp, and 64 rows are enough for four of the eight warps. So
both warp groups of a Hopper block compute all scores, half of the work, and the total is 1.5 times what it could be. Steps of
64 features avoid it, but read three times as much from the second-level cache per tile, which limits Hopper sooner."""
MOST_SECONDS = 30.0
"""Of compiling one cell; a sort written carelessly took minutes."""
FAMILY = {8: "mma.sync", 9: "wgmma", 10: "tcgen05", 12: "mma.sync"}
"""Instructions the tensor cores of an architecture (by its major version) are driven with at full rate."""
FAMILY_IN_PTX = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
TENSOR_INSTRUCTION = re.compile(r"\s(?:HMMA|HGMMA|UTC\w*MMA)\b")
BATCH, CAPTIONS = 4096, 10_000
"""Any sizes do: no kernel is specialised for them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One recorded kernel launch: what the compiler is told about its arguments."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One row of the matrix; the name says which."""

    capability: tuple[int, int]
    dtype: torch.dtype
    dim: int
    variant: str
    launch: Callable[[], object]
    kernel: str

    @property
    def name(self) -> str:
        return f"{_dotted(self.capability)} {self.kernel} {self.variant} {DTYPES[self.dtype]} {self.dim}"


def cells(*, dims: Iterable[int] = (USUAL_DIM, *OTHER_DIMS)) -> Iterator[Cell]:
    """All cells: every kernel, architecture and number of features; every dtype and variant at the usual number of features."""
    for capability in tiles.SHARED_MEMORY_KIB:
        for dim in dims:
            for dtype in DTYPES if dim == USUAL_DIM else (torch.bfloat16, torch.float32):
                yield from _softmax_cells(capability, dtype, dim)
                yield from _stats_cells(capability, dtype, dim, all_variants=dim == USUAL_DIM)
                yield from _other_cells(capability, dtype, dim)


def _softmax_cells(capability: tuple[int, int], dtype: torch.dtype, dim: int) -> Iterator[Cell]:
    tile = tiles.softmax_tile(capability, dtype=dtype, dim=dim)

    def launch() -> object:
        return triton_softmax.bank_softmax(*_features(dtype, dim), _scale(), tile=tile, splits=2)

    yield Cell(capability=capability, dtype=dtype, dim=dim, variant=tiles.precision_of(dtype), launch=launch, kernel="softmax_kernel")
    if dtype == torch.bfloat16:  # its inputs are float32 whatever the features are
        yield Cell(capability=capability, dtype=torch.float32, dim=dim, variant="sums", launch=launch, kernel="combine_kernel")


def _stats_cells(capability: tuple[int, int], dtype: torch.dtype, dim: int, *, all_variants: bool) -> Iterator[Cell]:
    tile, pair_tile = tiles.stats_tile(capability, dtype=dtype), tiles.pair_tile(dtype=dtype)
    for grouped in (True, False) if all_variants else (True,):
        groups = torch.empty(CAPTIONS, dtype=torch.int64, device="meta") if grouped else None

        def launch(groups: Tensor | None = groups) -> object:
            return triton_stats.bank_stats(*_features(dtype, dim), _scale(), _indices(), groups, tile=tile, pair_tile=pair_tile, splits=2)

        variant = "groups" if grouped else "alone"
        yield Cell(capability=capability, dtype=dtype, dim=dim, variant=variant, launch=launch, kernel="stats_kernel")


def _other_cells(capability: tuple[int, int], dtype: torch.dtype, dim: int) -> Iterator[Cell]:
    tile, pair_tile = tiles.topk_tile(dtype=dtype), tiles.pair_tile(dtype=dtype)
    threshold = torch.empty(BATCH, device="meta")
    for kernel, launch in (
        ("filter_kernel", lambda: triton_topk.candidates(*_features(dtype, dim), threshold, capacity=416, splits=2, tile=tile)),
        ("row_kernel", lambda: triton_scores.row_scores(*_features(dtype, dim), step=8, tile=tile)),
        ("pair_kernel", lambda: triton_scores.pair_scores(*_features(dtype, dim), _indices()[:, None], tile=pair_tile)),
    ):
        yield Cell(capability=capability, dtype=dtype, dim=dim, variant=tiles.precision_of(dtype), launch=launch, kernel=kernel)


def recorded(cell: Cell) -> Launch:
    """Run the cell's launcher and catch the launch it is about; a second one of the same kernel is compiled alike."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: Any, num_warps: int, num_stages: int = 3, **options: Any) -> None:
        if kernel.__name__ == cell.kernel:
            constants = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
            launches.append(_launch(kernel, args, constants, warps=num_warps, stages=num_stages))

    with mock.patch.object(JITFunction, "run", run):
        cell.launch()
    return launches[0]


def _launch(kernel: JITFunction[Any], args: Sequence[Any], constants: dict[str, Any], *, warps: int, stages: int) -> Launch:
    """As Triton's own binder sees it: tensors are aligned to 16 bytes, specialised integers are multiples of 16."""
    signature, aligned = {}, []
    constants = dict(constants)
    for parameter, value in zip(kernel.params, args, strict=False):
        if value is None:
            constants[parameter.name] = None
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{POINTERS[value.dtype]}"
            aligned.append(parameter.name)
        else:
            signature[parameter.name] = "i32"
            if not parameter.do_not_specialize and value % 16 == 0:
                aligned.append(parameter.name)
    signature |= dict.fromkeys(constants, "constexpr")
    order = {parameter.name: signature[parameter.name] for parameter in kernel.params}
    return Launch(kernel=kernel, signature=order, constants=constants, aligned=tuple(aligned), warps=warps, stages=stages)


def compile_cell(cell: Cell) -> dict[str, Any]:
    """Compile one cell; its row of the table."""
    launch = recorded(cell)
    place = {parameter.name: (number,) for number, parameter in enumerate(launch.kernel.params)}
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={place[name]: value for name, value in launch.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    start = time.perf_counter()
    major, minor = cell.capability
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 10 * major + minor, 32), options={"num_warps": launch.warps, "num_stages": launch.stages}
    )
    seconds = time.perf_counter() - start
    return {
        "name": cell.name,
        "tile": {name.lower(): value for name, value in launch.constants.items() if isinstance(value, int)},
        "warps": launch.warps,
        "stages": launch.stages,
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "redundancy": redundancy(compiled.asm["ttgir"]),
        **_from_cubin(compiled.asm["cubin"]),
        "family": next((name for name, found in FAMILY_IN_PTX.items() if re.search(found, compiled.asm["ptx"])), "none"),
        "compile_s": round(seconds, 1),
    }


def redundancy(ttgir: str) -> float:
    """How often the products of the worst matrix product are computed: warps times instruction shape against its own shape.

    A layout whose warps cover more rows or columns than there are repeats work in the warps that find none left.
    """
    layouts = {
        name: tuple(tuple(map(int, found.split(","))) for found in (warps, shape))
        for name, warps, shape in re.findall(
            r"(#\w+) = #ttg\.nvidia_mma<\{[^}]*warpsPerCTA = \[([\d, ]+)\][^}]*instrShape = \[([\d, ]+)\]", ttgir
        )
    }
    worst = 1.0
    for rows, columns, layout in re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir):
        (warps_down, warps_across), (height, width, *_depth) = layouts[layout]
        worst = max(worst, max(1.0, warps_down * height / int(rows)) * max(1.0, warps_across * width / int(columns)))
    return worst


def broken_bars(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row; nothing if it may run."""
    capability = tuple(int(part) for part in row["name"].split()[0].split("."))
    wanted = "none" if "combine_kernel" in row["name"] else FAMILY[capability[0]]
    most_redundancy = KNOWN_REDUNDANCY.get(" ".join(row["name"].split()[:2]), MOST_REDUNDANCY)
    limit = tiles.SHARED_MEMORY_KIB[capability[0], capability[1]] * 1024
    findings = {
        f"spills {row['stack_bytes']} + {row['local_bytes']} bytes": row["stack_bytes"] + row["local_bytes"] > 0,
        f"{row['shared_bytes']} bytes of shared memory, {limit} there are": row["shared_bytes"] > limit,
        f"{row['tensor_memory_columns']} columns of tensor memory": row["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS,
        f"{row['registers']} registers for each of {row['warps']} warps": row["registers"] * 32 * row["warps"] > 65_536,
        f"tensor cores by {row['family']} instead of {wanted}": row["family"] != wanted,
        "no tensor-core instruction in the machine code": wanted != "none" and row["tensor_instructions"] == 0,
        f"products computed {row['redundancy']:.2f} times": row["redundancy"] > most_redundancy,
        f"compiled for {row['compile_s']} s": row["compile_s"] > MOST_SECONDS,
    }
    return [finding for finding, wrong in findings.items() if wrong]


def missing_tool() -> str | None:
    """Why the matrix cannot be made here; None if it can."""
    return None if _tool("cuobjdump") else "no cuobjdump, neither beside triton nor on the PATH"


def _tool(name: str) -> str | None:
    """A CUDA binary tool: the one that came with triton fits its assembler, so it goes first."""
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(beside) if beside.is_file() else shutil.which(name)


def _from_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        instructions = _output(_tool("cuobjdump"), "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    tensor = len(TENSOR_INSTRUCTION.findall(instructions))
    return {"registers": registers, "stack_bytes": stack, "local_bytes": local, "tensor_instructions": tensor}


def _output(*command: str | None) -> str:
    return subprocess.run([part for part in command if part], capture_output=True, text=True, check=True).stdout


def _features(dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    return torch.empty(BATCH, dim, dtype=dtype, device="meta"), torch.empty(CAPTIONS, dim, dtype=dtype, device="meta")


def _scale() -> Tensor:
    return torch.empty((), device="meta")


def _indices() -> Tensor:
    return torch.empty(BATCH, dtype=torch.int64, device="meta")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "# Triton kernels, compiled",
        "",
        f"{len(rows)} cells, triton {triton.__version__}, by `python benchmarks/kernel_matrix.py`. Read from the compiled code; speed is",
        "not measured. Compute capabilities below 8.0 run torch. No cell spills. Tiles are rows x columns x depth; tensor memory is",
        "in columns; the last column says how often the worst product is computed.",
        "",
    ]
    head = (
        "capability, kernel, variant, dtype, features",
        "tile",
        "slice",
        "warps",
        "registers",
        "shared KiB",
        "tensor memory",
        "driven by",
        "times",
    )
    cells = []
    for row in rows:
        tile = row["tile"]
        shape = " x ".join(str(tile[name]) for name in ("rows", "columns", "depth") if name in tile)
        values = (
            row["name"],
            shape,
            tile.get("slice", ""),
            row["warps"],
            row["registers"],
            f"{row['shared_bytes'] / 1024:.1f}",
            row["tensor_memory_columns"] or "",
            row["family"],
            f"{row['redundancy']:g}",
        )
        cells.append(values)
    return "\n".join([*lines, markdown_table(head, cells)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, judge, and (unless only some were wanted) write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated substrings that a cell's name must all contain; nothing is written")
    options = parser.parse_args(arguments)
    reason = missing_tool()
    if reason:
        print(f"nothing compiled: {reason}", file=sys.stderr)
        return 1
    wanted = [part for part in options.only.split(",") if part]
    rows, broken = [], 0
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        for cell in cells():
            if all(part in cell.name for part in wanted):
                row = compile_cell(cell)
                findings = broken_bars(row)
                broken += bool(findings)
                rows.append(row)
                print(f"{cell.name}: {row['registers']} registers, {row['compile_s']} s {'; '.join(findings)}", flush=True)
    if not wanted and not broken:
        write_record(RECORD, name="kernel-matrix", rows=rows, settings={"batch": BATCH, "captions": CAPTIONS, "triton": triton.__version__})
        RECORD.with_suffix(".md").write_text(render(rows))
    print(f"{len(rows)} cells, {broken} with something wrong")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
