"""When the encoders train their blocks as one C++ function, and that everything else still goes block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from pairclip_fast.config import TileViTConfig, ViTConfig
from pairclip_fast.models import tower
from pairclip_fast.models.build import PairEncoder, build_model
from pairclip_fast.native import native

pytestmark = pytest.mark.skipif(native().module is None, reason=native().reason)
CONFIGS = [
    ViTConfig(width=64, depth=2, heads=2, mlp_width=64, patch_size=8),
    ViTConfig(width=32, depth=1, heads=1, mlp_width=64, patch_size=8, pre_norm=False, activation="relu"),
    TileViTConfig(width=32, depth=2, heads=1, mlp_width=64, patch_size=8, stem_width=0),
]


@pytest.fixture(autouse=True)
def _in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ours won on this machine in both formats."""
    monkeypatch.setattr(tower, "best_engine", {torch.bfloat16: "emulated", torch.float32: "portable"}.get)


def model_of(config: ViTConfig | TileViTConfig) -> PairEncoder:
    return build_model(config, tiles=2, tile_size=(32, 32), dim=16).train()


def calls_of(run: Callable[[], object]) -> int:
    with mock.patch.object(tower, "run", wraps=tower.run) as spy:
        run()
    return spy.call_count


def autocast(*, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize(("amp", "tolerance"), [(True, 2e-2), (False, 2e-5)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("config", CONFIGS, ids=["pre-norm", "post-norm", "per tile"])
def test_encoders_take_it_and_learn_the_same(config: ViTConfig | TileViTConfig, amp: bool, tolerance: float) -> None:
    model, images = model_of(config), torch.randn(3, 3, 32, 64)
    plain = copy.deepcopy(model)

    def step(trained: PairEncoder) -> Tensor:
        with autocast(enabled=amp):
            loss = trained(images)[:, 0].sum()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in trained.parameters() if parameter.grad is not None])

    found: list[Tensor] = []
    assert calls_of(lambda: found.append(step(model))) == 1
    with mock.patch.object(tower, "takes", return_value=False):
        assert calls_of(lambda: found.append(step(plain))) == 0
    assert float((found[0] - found[1]).norm() / found[1].norm()) < tolerance


def test_everything_else_goes_block_by_block() -> None:
    model, images = model_of(CONFIGS[0]), torch.randn(2, 3, 32, 64)

    def forward(changed: nn.Module | None = None) -> None:
        with autocast():
            (changed or model)(images)

    assert calls_of(forward) == 1
    assert calls_of(lambda: model(images)) == 1, "no autocast"
    assert calls_of(lambda: copy.deepcopy(model).double()(images.double())) == 0, "float64"
    with torch.autocast("cpu", dtype=torch.float16):
        assert calls_of(lambda: model(images)) == 0, "float16"
    with torch.no_grad():
        assert calls_of(forward) == 0, "no gradient"
    assert calls_of(lambda: forward(copy.deepcopy(model).eval())) == 0, "evaluation"
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert calls_of(forward) == 0, "compiling"
    with mock.patch.object(tower, "why_not_here", return_value="no tiles"):
        assert calls_of(forward) == 0, "another processor"
    again = copy.deepcopy(model)
    again.encoder.recompute = True
    assert calls_of(lambda: forward(again)) == 0, "recomputing"
    hooked = copy.deepcopy(model)
    next(hooked.encoder.blocks.children()).register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    assert calls_of(lambda: forward(hooked)) == 0, "hooks"
    narrow = model_of(ViTConfig(width=48, depth=1, heads=3, mlp_width=64, patch_size=8))
    assert calls_of(lambda: forward(narrow)) == 0, "heads of 16"


def test_the_choice_has_a_reason() -> None:
    blocks = model_of(CONFIGS[0]).encoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    cpu, bf16 = torch.device("cpu"), torch.bfloat16

    def chosen(given: nn.ModuleList | None = blocks, device: torch.device = cpu, dtype: torch.dtype | None = bf16, **how: bool) -> str:
        settings = {"recompute": False, "compiled": False} | how
        found = tower.implementation(given, device=device, autocast=dtype, **settings)
        return f"{found.name} ({found.reason})"

    assert chosen() == "cpp (C++, emulated, bfloat16 products, float32 sums)"
    assert chosen(None) == "none (the encoder is no transformer)"
    assert chosen(device=torch.device("cuda")) == "torch (nothing of our own for cuda)"
    assert chosen(dtype=None) == "cpp (C++, portable, float32)"
    assert chosen(dtype=torch.float16).startswith("torch (no float16 products faster than torch's (")
    assert chosen(recompute=True) == "torch (activations are recomputed)"
    assert chosen(compiled=True) == "torch (compiled by torch)"


@pytest.mark.parametrize(
    ("isa", "bfloat16", "float32"),
    [("amx", "amx", None), ("avx2", None, "avx2"), ("avx512", None, None), ("avx512_bf16", "avx512_bf16", "avx512")],
)
def test_each_machine_has_its_format(isa: str, bfloat16: str | None, float32: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tower, "native", lambda: native()._replace(module=mock.Mock(isa=lambda: isa)))
    assert (tower.best_engine(torch.bfloat16), tower.best_engine(torch.float32)) == (bfloat16, float32)
    for numbers, engine in ((torch.bfloat16, bfloat16), (torch.float32, float32)):
        name = str(numbers).removeprefix("torch.")
        assert tower.why_not_here(numbers) == (None if engine else f"no {name} products faster than torch's ({isa})")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "native", lambda: native()._replace(module=None, reason="PAIRCLIP_NATIVE=off"))
    assert tower.why_not_here(torch.float32) == "PAIRCLIP_NATIVE=off"
