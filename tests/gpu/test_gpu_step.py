"""A training step on a real CUDA device: it queues work and waits for none of it. Skipped, and counted, without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tiny_step import CAPTIONS, FP32, make_batch, make_module
from torch import nn

from pairclip_fast.config import LossConfig, OptimizerConfig
from pairclip_fast.losses import ContrastiveLoss
from pairclip_fast.train.device import Placement
from pairclip_fast.train.distributed import Processes
from pairclip_fast.train.guard import FiniteGuard
from pairclip_fast.train.loop import Trainee, train_step
from pairclip_fast.train.optimizer import build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LOSSES = {"bank": LossConfig(), "infonce": LossConfig(kind="infonce", label_smoothing=0.0)}


@pytest.fixture(autouse=True)
def _silent_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_does_not_wait_for_the_device(loss: str, optimizer: str) -> None:
    cuda = torch.device("cuda", 0)
    module, config = make_module(), dataclasses.replace(OptimizerConfig(), kind=optimizer)
    module.loss = ContrastiveLoss(LOSSES[loss], bank=nn.functional.normalize(torch.randn(CAPTIONS, 6), dim=-1))
    module.to(cuda)
    trainee = Trainee(
        module=module,
        optimizer=build_optimizer(module, config=config),
        config=config,
        schedule=lambda _step: 1e-3,
        placement=Placement(cuda, "test"),
        processes=Processes(),
        scaler=FP32.gradient_scaler(),
        guard=FiniteGuard(cuda),
    )
    batch = make_batch().map(lambda tensor: tensor.to(cuda))
    train_step(trainee, batch, step=0)  # compiles, and makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    for step in (1, 2):
        train_step(trainee, batch, step=step)
