"""The kernel matrix: its judgement on made-up rows, its reading of layouts, and a few cells compiled again."""

from __future__ import annotations

import json
from typing import Any

import kernel_matrix
import pytest
import triton

from pairclip_fast.kernels import tiles

GOOD = {
    "name": "9.0 softmax_kernel ieee bf16 512",
    "warps": 8,
    "registers": 250,
    "stack_bytes": 0,
    "local_bytes": 0,
    "shared_bytes": 196_608,
    "tensor_memory_columns": 0,
    "redundancy": 1.0,
    "family": "wgmma",
    "tensor_instructions": 68,
    "compile_s": 2.0,
}
STATES = ("registers", "shared_bytes", "tensor_memory_columns", "tensor_instructions", "redundancy", "family", "tile", "warps", "stages")
AGAIN = ("8.0 softmax_kernel ieee bf16 512", "9.0 stats_kernel groups fp32 512", "10.0 filter_kernel ieee bf16 512")
"""Between them the three large kernels and every family of tensor-core instructions; all cells are the benchmark's business."""


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kernel_matrix.RECORD.read_text())
    return found


def test_a_good_row_passes() -> None:
    assert kernel_matrix.broken_bars(GOOD) == []


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"local_bytes": 8}, "spills"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"tensor_memory_columns": 576}, "tensor memory"),
        ({"registers": 200, "warps": 16}, "registers"),
        ({"family": "mma.sync"}, "instead of wgmma"),
        ({"tensor_instructions": 0}, "no tensor-core instruction"),  # a kernel that is only a trap
        ({"redundancy": 2.5}, "computed 2.50 times"),
        ({"name": "9.0 stats_kernel groups bf16 512", "redundancy": 1.5}, "computed 1.50 times"),
        ({"compile_s": 60.0}, "compiled for 60"),
        ({"name": "8.6 softmax_kernel tf32x3 fp32 512", "family": "mma.sync", "shared_bytes": 100 * 1024 + 1}, "shared memory"),
    ],
)
def test_every_bar_can_be_broken(change: dict[str, Any], finding: str) -> None:
    (found,) = kernel_matrix.broken_bars(GOOD | change)
    assert finding in found


def test_warps_without_rows_of_their_own_are_found() -> None:
    layout = "#mma = #ttg.nvidia_mma<{{versionMajor = 2, versionMinor = 0, warpsPerCTA = [{}], instrShape = [16, 8]}}>\n"
    product = "%5 = tt.dot %1, %2, %3, inputPrecision = tf32 : tensor<64x32xf32, #a> * tensor<32x32xf32, #b> -> tensor<64x32xf32, #mma>"
    assert kernel_matrix.redundancy(layout.format("8, 1") + product) == 2.0
    assert kernel_matrix.redundancy(layout.format("4, 2") + product) == 1.0
    assert kernel_matrix.redundancy(layout.format("4, 8") + product) == 2.0


def test_the_record_covers_every_cell_and_breaks_no_bar() -> None:
    rows = {row["name"]: row for row in record()["rows"]}
    assert set(rows) == {cell.name for cell in kernel_matrix.cells()}
    for row in rows.values():
        assert kernel_matrix.broken_bars(row) == [], row["name"]
    assert {name.split()[0] for name in rows} == {".".join(map(str, capability)) for capability in tiles.SHARED_MEMORY_KIB}
    assert kernel_matrix.RECORD.with_suffix(".md").read_text() == kernel_matrix.render(record()["rows"])


@pytest.mark.parametrize("name", AGAIN)
def test_a_cell_compiles_as_recorded(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    reason = kernel_matrix.missing_tool()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    (cell,) = (cell for cell in kernel_matrix.cells() if cell.name == name)
    row = kernel_matrix.compile_cell(cell) | {"compile_s": 0.0}  # this machine may be busy
    assert kernel_matrix.broken_bars(row) == []
    if record()["settings"]["triton"] != triton.__version__:
        pytest.skip(f"the record was made with triton {record()['settings']['triton']}")
    (committed,) = (recorded for recorded in record()["rows"] if recorded["name"] == name)
    assert {state: row[state] for state in STATES} == {state: committed[state] for state in STATES}


def test_a_kernel_that_spills_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The control: a tile known to be too large for its warps must break the bars when it is really compiled."""
    reason = kernel_matrix.missing_tool()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    monkeypatch.setattr(tiles, "topk_tile", lambda dtype: tiles.Tile(rows=128, columns=64, depth=64, warps=4, stages=3))
    cell = next(cell for cell in kernel_matrix.cells(dims=(512,)) if cell.kernel == "filter_kernel")
    assert any("spills" in finding for finding in kernel_matrix.broken_bars(kernel_matrix.compile_cell(cell)))
