"""Number format, device and processes: what is chosen, and which reason is given."""

from __future__ import annotations

import pytest
import torch

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.train import precision
from pairclip_fast.train.device import choose_device
from pairclip_fast.train.distributed import Processes, join, local_batch
from pairclip_fast.train.precision import Precision, choose_precision


@pytest.mark.parametrize(
    ("capability", "native", "expected"),
    [((6, 1), True, "fp32"), ((7, 5), True, "fp16"), ((7, 0), False, "fp16"), ((8, 0), True, "bf16"), ((9, 0), True, "bf16")],
)
def test_cuda_takes_bfloat16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, events: EventLog, capability: tuple[int, int], native: bool, expected: str
) -> None:
    """Torch calls bfloat16 supported on Turing too, where it is emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    chosen = choose_precision(torch.device("cuda", 0), amp=True, events=events)
    assert chosen.name == expected
    said = {"fp16": ["fp16 with loss scaling"], "fp32": ["fp32"], "bf16": []}
    assert [event["chosen"] for event in events.fallbacks] == said[expected]
    assert choose_precision(torch.device("cuda", 0), amp=False, events=events).name == "fp32"


@pytest.mark.parametrize(
    ("vendor", "amx", "avx", "expected"),
    [
        ("GenuineIntel", True, True, "AMX"),
        ("GenuineIntel", False, True, None),
        ("GenuineIntel", False, False, None),
        ("AuthenticAMD", False, True, "AVX-512 BF16"),
        ("AuthenticAMD", False, False, None),
        ("", False, True, "AVX-512 BF16"),
    ],
)
def test_a_cpu_takes_bfloat16_only_with_instructions_that_pay(
    monkeypatch: pytest.MonkeyPatch, events: EventLog, vendor: str, amx: bool, avx: bool, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(precision, "cpu_vendor", lambda: vendor)
    assert precision.cpu_bf16_feature() == expected
    chosen = choose_precision(torch.device("cpu"), amp=True, events=events)
    assert chosen.name == ("bf16" if expected else "fp32")
    assert [("AVX-512 BF16" in event["reason"]) for event in events.fallbacks] == ([] if expected else [avx])


def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU" if device.index < 2 else 1 / 0)
    assert choose_device("auto", local_rank=1, events=events).device == torch.device("cuda", 1)
    with pytest.raises(EnvironmentLackingError, match="at most 2 processes"):
        choose_device("auto", local_rank=2, events=events)


def test_only_fp16_scales_the_loss() -> None:
    assert not Precision("bf16", "cpu", "").gradient_scaler().is_enabled()
    assert Precision("fp32", "cpu", "").dtype == torch.float32


def test_the_device_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", events=events).device.type == "cpu"
    assert [event["what"] for event in events.fallbacks] == ["device"]
    assert choose_device("cpu", events=events).device.type == "cpu"
    assert len(events.fallbacks) == 1
    with pytest.raises(EnvironmentLackingError, match="CUDA"):
        choose_device("cuda", events=events)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Found no NVIDIA driver on your system. Please check that"), "no CUDA device found"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"), "too old (found version 11040)"),
        (None, "no CUDA device found"),
    ],
    ids=["none", "old driver", "no words"],
)
def test_why_there_is_no_gpu_is_said_in_torchs_words(
    error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch, events: EventLog
) -> None:
    def init() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    choose_device("auto", events=events)
    assert reason in events.fallbacks[0]["reason"]


def test_one_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from pairclip_fast.errors import ConfigError

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    processes = join()
    assert processes == Processes()
    assert (processes.agree(15), processes.share("x"), processes.is_first) == (15, "x", True)
    assert local_batch(32, processes=Processes(world_size=2), accumulate=4) == 4
    with pytest.raises(ConfigError, match="2 processes"):
        local_batch(30, processes=Processes(world_size=2), accumulate=4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        join()
