"""Triton's interpreter as a machine to test on: kernels run on CPU tensors, one program after the other.

`TRITON_INTERPRET=1` must be set before triton is imported, so these files run in a process of their own, started by
`test_triton_interpreted.py`; their names do not match pytest's pattern, and a plain run does not collect them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROCESSORS = 4


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """A result that was never written must not look right because the memory still holds an earlier one."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _repaired_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as 16-bit integers, multiplies those, and rounds towards zero (triton 3.8)."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_dot, plain_convert = builder.create_dot, interpreter._convert_float

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return plain_convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: plain_dot(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Make `triton_cuda` take the CPU for a GPU of some compute capability, and the ops take `triton_cuda` on it."""
    import torch

    from pairclip_fast.kernels import choice, triton_cuda

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(triton_cuda, "CHECKED_SIZES", ((70, 300),))  # the interpreter takes long for the real ones
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=PROCESSORS))
        monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
        monkeypatch.setitem(choice.CANDIDATES, "cpu", ("triton", "pairclip_fast.kernels.triton_cuda"))
        for cached in (choice._resolve, triton_cuda.failure):
            cached.cache_clear()

    return pretend


@pytest.fixture
def shuffled_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Run the programs of every grid in another order; on a GPU no order is promised."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain = type(builder).set_grid_idx

    def shuffle(seed: int) -> None:
        def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
            grid = self.grid_dim
            order = np.random.default_rng(seed).permutation(int(np.prod(grid)))
            plain(self, *(int(place) for place in np.unravel_index(order[np.ravel_multi_index((x, y, z), grid)], grid)))

        monkeypatch.setattr(type(builder), "set_grid_idx", set_grid_idx)

    return shuffle


@pytest.fixture
def mutated(tmp_path: Path) -> Callable[[str, str, str], ModuleType]:
    """A copy of a kernel module with one passage of its source replaced; the product's own code has no switches for this."""

    def mutate(name: str, old: str, new: str) -> ModuleType:
        specification = importlib.util.find_spec(f"pairclip_fast.kernels.{name}")
        assert specification is not None
        assert specification.origin is not None
        source = Path(specification.origin).read_text()
        assert source.count(old) >= 1, f"the passage to break is gone from {name}: {old}"
        path = tmp_path / f"mutated_{name}.py"
        path.write_text(source.replace(old, new))
        copy = importlib.util.spec_from_file_location(path.stem, path)
        assert copy is not None
        assert copy.loader is not None
        module = importlib.util.module_from_spec(copy)
        copy.loader.exec_module(module)
        return module

    return mutate
