"""The training step and its parts: accumulation, averages, guard, groups, number formats, compiling."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pairclip_fast.config import LossConfig, OptimizerConfig, ViTConfig
from pairclip_fast.data.loader import Batch
from pairclip_fast.errors import EnvironmentLackingError, NumericsError
from pairclip_fast.events import Event, EventLog
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.models.build import build_model
from pairclip_fast.telemetry.memory import host_memory
from pairclip_fast.telemetry.time_ledger import TimeLedger
from pairclip_fast.telemetry.timing import StepMeter, peak_tflops, words_for_seconds
from pairclip_fast.train import compiling, precision
from pairclip_fast.train.device import Placement, choose_device
from pairclip_fast.train.distributed import Processes, join, local_batch
from pairclip_fast.train.ema import Ema
from pairclip_fast.train.guard import FP16_STREAK, FiniteGuard
from pairclip_fast.train.loop import LossModule, Trainee, train_epoch, train_step
from pairclip_fast.train.optimizer import build_optimizer, parameter_groups
from pairclip_fast.train.precision import Precision, choose_precision
from pairclip_fast.train.progress import Progress

CPU = Placement(torch.device("cpu"), "test")
FP32 = Precision("fp32", "cpu", "test")
CAPTIONS = 12


def make_module(seed: int = 0) -> LossModule:
    torch.manual_seed(seed)
    encoder = build_model(ViTConfig(width=16, depth=1, heads=2, mlp_width=16, patch_size=16), tiles=2, tile_size=(32, 32), dim=6)
    bank = nn.functional.normalize(torch.randn(CAPTIONS, 6), dim=-1)
    return LossModule(encoder, ContrastiveLoss(LossConfig(), bank=bank), precision=FP32)


def make_trainee(**changes: Any) -> Trainee:
    """A large eps: Adam with a small one makes full steps of the rounding noise where the gradient is zero (biases of keys)."""
    config = dataclasses.replace(OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3), **changes)
    module = make_module()
    return Trainee(
        module=module,
        optimizer=build_optimizer(module, config=config),
        config=config,
        schedule=lambda step: 1e-2 / (1 + step),
        placement=CPU,
        processes=Processes(),
        scaler=FP32.gradient_scaler(),
        guard=FiniteGuard(CPU.device),
        ema=Ema(module, decay=config.ema_decay) if config.ema_decay else None,
    )


def make_batch(size: int = 8, *, seed: int = 0, padding: int = 0, mixed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(size) < size - padding
    return Batch(
        images=torch.randn(size, 3, 32, 64, generator=generator),
        caption_ids=torch.randint(CAPTIONS, (size,), generator=generator),
        sample_ids=torch.arange(size) + 100 * seed,
        valid=valid,
        epoch=0,
        step=seed,
        partner_caption_ids=torch.randint(CAPTIONS, (size,), generator=generator) if mixed else None,
        mix_weight=torch.rand(size, generator=generator) if mixed else None,
    )


def parameters(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainee.module.named_parameters()}


@pytest.mark.parametrize(("pieces", "padding", "mixed"), [(2, 0, False), (4, 3, False), (2, 3, True)])
def test_accumulated_pieces_are_the_whole_batch(pieces: int, padding: int, mixed: bool) -> None:
    """Also with padding, which the pieces share unevenly, and with mixtures."""
    whole, parts = make_trainee(), make_trainee(accumulate=pieces)
    for step in range(3):
        batch = make_batch(seed=step, padding=padding, mixed=mixed)
        one, many = train_step(whole, batch, step=step), train_step(parts, batch, step=step)
        assert torch.allclose(one.loss, many.loss, rtol=1e-5)
        assert torch.allclose(one.grad_norm, many.grad_norm, rtol=1e-4)
    for name, value in parameters(whole).items():
        assert torch.allclose(value, parameters(parts)[name], atol=2e-5), name


def test_the_step_is_what_plain_torch_does() -> None:
    """The oracle: the same three steps written out with an unfused optimizer."""
    trainee, plain = make_trainee(clip_norm=0.5), make_module()
    groups = parameter_groups(plain, config=trainee.config)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=trainee.config.betas, eps=trainee.config.eps, fused=False, foreach=False)
    for step in range(3):
        batch = make_batch(seed=step)
        result = train_step(trainee, batch, step=step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        loss = plain(batch.images, batch.caption_ids, batch.valid)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert torch.allclose(result.loss, loss, rtol=1e-6)
        assert torch.allclose(result.grad_norm, norm, rtol=1e-5)
    for (name, mine), theirs in zip(trainee.module.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name


def test_a_mixture_reaches_the_loss() -> None:
    trainee, batch = make_trainee(), make_batch(mixed=True)
    assert batch.partner_caption_ids is not None
    assert batch.mix_weight is not None
    module = make_module()
    features = module.encode(batch.images)
    own, other = (torch.nn.functional.one_hot(ids, CAPTIONS) for ids in (batch.caption_ids, batch.partner_caption_ids))
    target = batch.mix_weight[:, None] * own + (1 - batch.mix_weight[:, None]) * other
    expected = nn.functional.cross_entropy(module.loss.scale * features @ module.loss.bank.T, target)
    assert torch.allclose(train_step(trainee, batch, step=0).loss, expected, rtol=1e-5)


def test_no_clipping_reports_the_norm_and_keeps_the_gradient() -> None:
    trainee = make_trainee(clip_norm=0.0)
    result = train_step(trainee, make_batch(), step=0)
    norm = torch.stack([p.grad.norm() for p in trainee.module.parameters() if p.grad is not None]).norm()
    assert torch.allclose(result.grad_norm, norm, rtol=1e-5)


def test_the_epoch_counts_and_stops_when_told() -> None:
    trainee, progress, seen = make_trainee(), Progress(), []

    def after_step(batch: Batch, result: Any) -> bool:
        seen.append((batch.step, progress.step, float(result.loss)))
        return len(seen) == 2

    assert train_epoch(trainee, [make_batch(seed=n) for n in range(4)], progress, after_step=after_step)
    assert [(step, count) for step, count, _ in seen] == [(0, 1), (1, 2)]
    assert progress.samples_seen == 16


def test_averages_follow_the_formula_and_share_the_bank() -> None:
    trainee = make_trainee(ema_decay=0.5)
    assert trainee.ema is not None
    expected = {name: value.double() for name, value in parameters(trainee).items()}
    for step in range(4):
        train_step(trainee, make_batch(seed=step), step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * parameters(trainee)[name].double() for name, value in expected.items()}
    for name, value in trainee.ema.module.named_parameters():
        assert torch.allclose(value.double(), expected[name], atol=1e-6), name
        assert not value.requires_grad
    assert trainee.evaluated is trainee.ema.module
    assert trainee.ema.module.loss.bank is trainee.module.loss.bank
    assert make_trainee().evaluated.training


def test_batch_statistics_are_copied_into_the_average() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ema = Ema(module, decay=0.9)
    module(torch.randn(8, 3, 2, 2))
    ema.update(module, step=5)
    for mine, theirs in zip(ema.module.buffers(), module.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_decay_acts_on_matrices_and_filters_only() -> None:
    module = make_module()
    names = {id(value): name for name, value in module.named_parameters()}
    decayed, kept = parameter_groups(module, config=OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    decayed_names = {names[id(value)] for value in decayed["params"]}  # type: ignore[attr-defined]
    kept_names = {names[id(value)] for value in kept["params"]}  # type: ignore[attr-defined]
    assert all(name.endswith("weight") and "norm" not in name for name in decayed_names)
    assert {"loss.logit_scale", "encoder.encoder.cls", "encoder.encoder.positions", "encoder.head.bias"} <= kept_names
    assert len(decayed_names) + len(kept_names) == len(names)
    (everything,) = parameter_groups(module, config=OptimizerConfig(weight_decay=0.3, decay_all=True))
    assert len(everything["params"]) == len(names)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_guard_skips_the_update_on_the_device_and_stays(kind: Any, events: EventLog, recorded: list[Event]) -> None:
    trainee = make_trainee(kind=kind, ema_decay=0.0)
    train_step(trainee, make_batch(seed=0), step=0)
    before, moments = parameters(trainee), copy.deepcopy(trainee.optimizer.state_dict()["state"])
    bad = make_batch(seed=1)
    train_step(trainee, dataclasses.replace(bad, images=bad.images.index_fill(0, torch.tensor([3]), torch.inf)), step=1)
    train_step(trainee, make_batch(seed=2), step=2)
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainee).items())
    for key, state in trainee.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in state.items())
    with pytest.raises(NumericsError, match="step 1"):
        trainee.guard.check(events=events)
    (event,) = recorded
    assert event["sample_ids"] == bad.sample_ids.tolist()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_step_keeps_to_its_device(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for CUDA without one: forward, guard, clipping, fused update and averages mix no devices.

    The backward pass of the autograd engine wants a driver; it is replaced by gradients of the right shape.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    device, module = torch.device("cuda", 0), make_module()
    config = OptimizerConfig(kind=kind, ema_decay=0.9, accumulate=2)

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == device
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to(device)
            trainee = Trainee(
                module=module,
                optimizer=build_optimizer(module, config=config),
                config=config,
                schedule=lambda step: 0.1,
                placement=Placement(device, "traced"),
                processes=Processes(),
                scaler=FP32.gradient_scaler(),
                guard=FiniteGuard(device),
                ema=Ema(module, decay=0.9),
            )
            batch = make_batch()
            tensors = {name: getattr(batch, name).to(device) for name in ("images", "caption_ids", "sample_ids", "valid")}
            for step in range(2):
                result = train_step(trainee, dataclasses.replace(batch, **tensors), step=step)
                assert (result.loss.device, result.grad_norm.device) == (device, device)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_guard_bears_overflows_of_fp16_but_not_a_streak(events: EventLog) -> None:
    guard, inf, one = FiniteGuard(torch.device("cpu"), tolerance=FP16_STREAK), torch.tensor(torch.inf), torch.tensor(1.0)
    for step in range(3 * FP16_STREAK):
        bad = step % FP16_STREAK != 0
        assert bool(guard.inspect(one, inf if bad else one, step=step, batch=make_batch(2))) is bad
    guard.check(events=events)
    for step in range(FP16_STREAK + 2):
        guard.inspect(inf, one, step=100 + step, batch=make_batch(2))
    with pytest.raises(NumericsError):
        guard.check(events=events)


def test_bfloat16_autocast_trains_to_about_the_same_losses() -> None:
    """The path of CPUs with bfloat16 instructions; slow but correct on all others."""
    exact, rounded = make_trainee(eps=1.0), make_trainee(eps=1.0)
    rounded.module.precision = Precision("bf16", "cpu", "test")
    for step in range(3):
        one, other = train_step(exact, make_batch(), step=step), train_step(rounded, make_batch(), step=step)
        assert other.loss.dtype == torch.float32
        assert torch.allclose(one.loss, other.loss, rtol=0.05)
    assert all(value.dtype == torch.float32 for value in parameters(rounded).values())


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


def test_compiling_that_fails_falls_back_to_eager_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(*_: object, **__: object) -> Any:
        def forward(_images: torch.Tensor) -> torch.Tensor:
            raise InvalidCxxCompiler

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    trainee, twin = make_trainee(), make_trainee()
    random = torch.get_rng_state()
    said = compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert said.startswith("eager")
    assert "InvalidCxxCompiler" in events.fallbacks[0]["reason"]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, parameters(twin)[name]) for name, value in parameters(trainee).items())
    assert all(value.grad is None for value in trainee.module.parameters())
    assert torch.equal(train_step(trainee, make_batch(), step=0).loss, train_step(twin, make_batch(), step=0).loss)


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch, events: EventLog, tmp_path: Path) -> None:
    """The real thing: no C++ compiler on the PATH."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "compile_threads": 1}):
        said = compiling.compile_encoder(make_trainee(), setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert said == "eager (compiling failed)"
    assert len(events.fallbacks) == 1


def test_compiling_is_left_out_on_a_cpu_unless_asked_for(events: EventLog) -> None:
    for setting in ("auto", "off"):
        trainee = make_trainee()
        encode = trainee.module.encode
        assert (
            compiling.compile_encoder(trainee, setting=setting, images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)[:5]
            == "eager"
        )
        assert trainee.module.encode == encode
    assert events.fallbacks == []


def test_a_failure_of_the_model_itself_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    def forward(_images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the model is wrong")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainee = make_trainee()
    trainee.module.encoder.forward = forward  # type: ignore[method-assign]
    trainee.module.encode = forward
    with pytest.raises(RuntimeError, match="the model is wrong"):
        compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert events.fallbacks == []


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


def test_the_meter_reads_rates_and_survives_a_clock_that_stands_still() -> None:
    now = [0.0]
    ledger = TimeLedger(mark=lambda: now[0])
    meter = StepMeter(ledger, clock=lambda: now[0])
    for phase, until in (("evaluation", 2.0), ("wait", 2.5), ("backward", 4.0)):
        now[0] = until
        ledger.lap(phase)  # type: ignore[arg-type]
    for _ in range(4):
        meter.count(8)
    assert meter.due
    rates = meter.read()
    assert (rates.steps, rates.pairs_per_second, rates.data_wait_fraction) == (4, 16.0, 0.25), "the evaluation is no part of it"
    assert rates.time_s == {"evaluation": 2.0, "wait": 0.5, "backward": 1.5}
    assert not meter.due
    assert meter.read().pairs_per_second == 0.0


def test_durations_memory_and_peak() -> None:
    assert [words_for_seconds(value) for value in (-3.0, 41.6, 200.0, 7500.0)] == ["0 s", "42 s", "3 min 20 s", "2 h 05 min"]
    memory = host_memory()
    assert 0.01 < memory["rss_gib"] <= memory["peak_rss_gib"]
    state = torch.get_rng_state()
    assert peak_tflops(torch.device("cpu"), dtype=torch.float32, synchronise=lambda: None) > 1e-3
    assert torch.equal(torch.get_rng_state(), state)
