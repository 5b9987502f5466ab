"""The C++ kernels as the package uses them: chosen and named, within their memory, training to the same losses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairclip_fast.config import LossConfig
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.kernels import choice, cpp, ops, portable
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.native import native
from pairclip_fast.telemetry.memory import reset_host_peak

CPU = torch.device("cpu")
built = pytest.mark.skipif(native().module is None, reason=native().reason)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_runs(dtype: torch.dtype) -> None:
    emb, bank = unit(3, 5, seed=0).to(dtype), unit(4, 5, seed=1).to(dtype)
    assert choice.kernels_for(emb, bank) is cpp
    assert ops.implementation(CPU, dtype=torch.float32, dim=64).reason.startswith(f"C++, {cpp.best_engine()}")


@built
@pytest.mark.parametrize(
    ("emb", "bank"),
    [
        (torch.zeros(3, 5).double(), torch.zeros(4, 5).double()),
        (torch.zeros(3, 5).half(), torch.zeros(4, 5).half()),
        (torch.zeros(5, 3).T, torch.zeros(4, 5)),
        (torch.zeros(3, 5), torch.zeros(5, 4).T),
        (torch.zeros(3, 0), torch.zeros(4, 0)),
    ],
    ids=["float64", "float16", "columns of emb", "columns of bank", "no depth"],
)
def test_what_it_does_not_cover_is_left_to_torch(emb: Tensor, bank: Tensor) -> None:
    assert choice.kernels_for(emb, bank) is portable
    assert ops.bank_softmax(emb, bank, torch.tensor(1.0))[0].shape == (3,)


def test_without_the_extension_torch_runs_and_the_reason_is_told() -> None:
    code = (
        "import torch; from pairclip_fast.kernels import ops; print(*ops.implementation(torch.device('cpu'), dtype=torch.float32, dim=64));"
        "print(ops.bank_topk(torch.ones(2, 3), torch.ones(4, 3), k=2)[1].tolist())"
    )
    environment = os.environ | {"PAIRCLIP_NATIVE": "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch PAIRCLIP_NATIVE=off", "[[0, 1], [0, 1]]"]


def test_asking_for_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "why_not", lambda _device, **_kind: "not built")
    monkeypatch.setenv(choice.VARIABLE, "cpp")
    choice._resolve.cache_clear()
    with pytest.raises(EnvironmentLackingError, match="not built"):
        ops.implementation(CPU, dtype=torch.float32, dim=64)
    choice._resolve.cache_clear()


@built
def test_sizes_are_checked_before_memory_is_touched() -> None:
    kernels, emb, bank = native().module.kernels, torch.zeros(3, 4), torch.zeros(5, 4)
    name, lse = cpp.best_engine(), torch.zeros(3)
    for arguments in (
        (name, 1, emb, bank, 1.0, lse[:2], torch.zeros(3, 4)),
        (name, 1, emb, bank, 1.0, lse, torch.zeros(3, 3)),
        (name, 1, emb, bank[:, :3], 1.0, lse, torch.zeros(3, 4)),
        (name, 1, emb, bank.bfloat16(), 1.0, lse, torch.zeros(3, 4)),
        (name, 1, emb.double(), bank.double(), 1.0, lse, torch.zeros(3, 4)),
        (name, 1, emb, torch.zeros(4, 5).T, 1.0, lse, torch.zeros(3, 4)),
        ("no such engine", 1, emb, bank, 1.0, lse, torch.zeros(3, 4)),
    ):
        with pytest.raises(ValueError, match="kernels"):
            kernels.bank_softmax(*arguments)
    with pytest.raises(ValueError, match="outputs"):
        kernels.bank_topk(name, 1, emb, bank, 3, torch.zeros(3, 2), torch.zeros(3, 3, dtype=torch.int64))


@built
@pytest.mark.skipif(not reset_host_peak(), reason="the kernel does not let a process reset its peak memory")
@pytest.mark.parametrize(("captions", "dim"), [(4_000, 512), (100_000, 32)])
def test_memory_is_bounded_and_does_not_grow_with_the_bank(captions: int, dim: int) -> None:
    """At most 24 MB beside the output for 4,096 rows; the scores alone would be 66 MB, or 1.6 GB."""
    emb, bank = unit(4096, dim, seed=0), unit(captions, dim, seed=1)
    reset_host_peak()
    before = timing.peak_rss_gib()
    _, mean = ops.bank_softmax(emb, bank, torch.tensor(20.0))
    assert (timing.peak_rss_gib() - before) * 2**30 <= 24e6 + mean.numel() * mean.element_size()


@built
def test_training_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps of a small encoder with a learnt temperature; a wrong gradient would part the two curves at once."""

    def losses(backend: str) -> Tensor:
        monkeypatch.setenv(choice.VARIABLE, backend)
        torch.manual_seed(0)
        images, ids = torch.randn(96, 24), torch.randint(0, 700, (96,))
        encoder = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 40))
        loss = ContrastiveLoss(LossConfig(label_smoothing=0.1), bank=unit(700, 40, seed=1))
        optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], lr=3e-3, eps=1e-4)
        found = []
        for _ in range(40):
            optimizer.zero_grad()
            value = loss(F.normalize(encoder(images), dim=-1), ids)
            value.backward()
            optimizer.step()
            found.append(value.detach())
        return torch.stack(found)

    portable_losses, own_losses = losses("torch"), losses("cpp")
    assert portable_losses[-1] < 0.8 * portable_losses[0]
    torch.testing.assert_close(own_losses, portable_losses, rtol=1e-4, atol=1e-4)
    assert not torch.equal(own_losses, portable_losses)  # two implementations have run
