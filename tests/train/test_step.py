"""The training step and its parts: accumulation, averages, guard, groups, bfloat16."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tiny_step import CAPTIONS, FP32, make_batch, make_module, make_trainee, parameters
from torch import nn

from pairclip_fast.config import OptimizerConfig
from pairclip_fast.data.loader import Batch
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import Event, EventLog
from pairclip_fast.train.device import Placement
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.ema import Ema
from pairclip_fast.train.guard import FP16_STREAK, FiniteGuard
from pairclip_fast.train.loop import Trainee, train_epoch, train_step
from pairclip_fast.train.optimizer import build_optimizer, parameter_groups
from pairclip_fast.train.precision import Precision
from pairclip_fast.train.progress import Progress


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


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_with_scaled_losses_the_guard_holds_the_weights_too(kind: Any) -> None:
    """The scaler looks at gradients only, and forgets an overflow with the next step; the guard does not."""
    trainee = make_trainee(kind=kind)
    trainee.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainee.guard = FiniteGuard(torch.device("cpu"), tolerance=2)
    train_step(trainee, make_batch(), step=0)
    before, forward = parameters(trainee), trainee.module.forward

    def infinite(*arguments: Any) -> torch.Tensor:
        loss = forward(*arguments)
        return loss + (torch.inf - loss.detach())  # its gradient is a number all the same

    trainee.module.forward = infinite  # type: ignore[method-assign]
    for step in range(3):
        train_step(trainee, make_batch(), step=1 + step)
    trainee.module.forward = forward  # type: ignore[method-assign]
    train_step(trainee, make_batch(), step=4)
    assert trainee.guard.tripped
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainee).items())


def test_bfloat16_autocast_trains_to_about_the_same_losses() -> None:
    """The path of CPUs with bfloat16 instructions; slow but correct on all others."""
    exact, rounded = make_trainee(eps=1.0), make_trainee(eps=1.0)
    rounded.module.precision = Precision("bf16", "cpu", "test")
    for step in range(3):
        one, other = train_step(exact, make_batch(), step=step), train_step(rounded, make_batch(), step=step)
        assert other.loss.dtype == torch.float32
        assert torch.allclose(one.loss, other.loss, rtol=0.05)
    assert all(value.dtype == torch.float32 for value in parameters(rounded).values())
