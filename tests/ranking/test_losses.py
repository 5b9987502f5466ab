"""The losses against float64 definitions; masks, groups, temperature; wrong versions that must differ."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairclip_fast.config import LossConfig
from pairclip_fast.kernels import reference
from pairclip_fast.losses import MAX_LOGIT_SCALE, ContrastiveLoss


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def make(
    kind: str = "bank", *, bank: Tensor, groups: Tensor | None = None, temperature: float = 0.1, smoothing: float = 0.0
) -> ContrastiveLoss:
    config = LossConfig(kind=kind, temperature=temperature, label_smoothing=smoothing)  # type: ignore[arg-type]
    return ContrastiveLoss(config, bank=bank, groups=groups).double()


BANK = unit(12, 6, seed=1)
GROUPS = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 0, 9, 9, 11])


def oracle_targets(ids: Tensor, groups: Tensor, *, smoothing: float) -> Tensor:
    """Weight spread evenly over the group, then over everything."""
    same = (groups == groups[ids][:, None]).double()
    return (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(groups)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["distinct", "groups"])
def test_bank_loss_and_its_gradients(smoothing: float, groups: Tensor | None) -> None:
    loss = make(bank=BANK, groups=groups, smoothing=smoothing)
    features, ids = unit(7, 6).requires_grad_(), torch.tensor([0, 3, 9, 10, 11, 5, 0])
    targets = oracle_targets(ids, torch.arange(12) if groups is None else groups, smoothing=smoothing)
    want = reference.bank_loss(features, BANK, loss.logit_scale.exp(), targets).mean()
    got = loss(features, ids)
    torch.testing.assert_close(got, want)
    inputs = (features, loss.logit_scale)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_bank_loss_is_cross_entropy() -> None:
    loss, features, ids = make(bank=BANK, smoothing=0.2), unit(7, 6), torch.arange(7)
    torch.testing.assert_close(loss(features, ids), F.cross_entropy(loss.scale * features @ BANK.T, ids, label_smoothing=0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["distinct", "groups"])
def test_bank_loss_of_mixtures(smoothing: float, groups: Tensor | None) -> None:
    """Cross entropy against the whole target distributions: mixed first, then smoothed."""
    loss = make(bank=BANK, groups=groups, smoothing=smoothing)
    features, ids, partners = unit(7, 6).requires_grad_(), torch.tensor([0, 3, 9, 10, 11, 5, 0]), torch.tensor([3, 3, 2, 8, 1, 7, 0])
    weight = torch.tensor([0.5, 0.0, 1.0, 0.3, 0.9, 0.25, 0.6], dtype=torch.float64)
    numbers = torch.arange(12) if groups is None else groups
    own, other = (oracle_targets(i, numbers, smoothing=smoothing) for i in (ids, partners))

    def definition(share: Tensor) -> Tensor:
        return reference.bank_loss(features, BANK, loss.logit_scale.exp(), share[:, None] * own + (1 - share)[:, None] * other).mean()

    got = loss(features, ids, partner_caption_ids=partners, mix_weight=weight)
    torch.testing.assert_close(got, definition(weight))
    inputs = (features, loss.logit_scale)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(definition(weight), inputs))
    for wrong in (1 - weight, torch.ones(7, dtype=torch.float64)):
        assert abs(float((got - definition(wrong)).detach())) > 0.01
    torch.testing.assert_close(loss(features, ids, partner_caption_ids=partners, mix_weight=torch.ones(7)), loss(features, ids))


def test_padding_rows_of_mixtures_do_not_exist() -> None:
    loss, features = make(bank=BANK), unit(3, 6)
    features[2] = torch.nan
    ids, partners, weight = torch.tensor([1, 2, -1]), torch.tensor([3, 4, -1]), torch.tensor([0.3, 0.8, torch.nan])
    got = loss(features, ids, torch.tensor([True, True, False]), partner_caption_ids=partners, mix_weight=weight)
    torch.testing.assert_close(got, loss(features[:2], ids[:2], partner_caption_ids=partners[:2], mix_weight=weight[:2]))


def infonce_oracle(features: Tensor, ids: Tensor, groups: Tensor, scale: Tensor, *, mask: bool = True) -> Tensor:
    """Row by row: the own pair against all pairs whose caption is another one."""
    rows = []
    for i in range(len(ids)):
        kept = [j for j in range(len(ids)) if j == i or not mask or groups[ids[j]] != groups[ids[i]]]
        own = kept.index(i)
        texts, images = BANK[ids[kept]], features[kept]
        rows.append(-torch.log_softmax(scale * texts @ features[i], dim=0)[own] / 2)
        rows.append(-torch.log_softmax(scale * images @ BANK[ids[i]], dim=0)[own] / 2)
    return torch.stack(rows).sum() / len(ids)


def test_infonce_masks_duplicates() -> None:
    bank, groups = BANK[GROUPS], GROUPS
    loss = make("infonce", bank=bank, groups=groups)
    features, ids = unit(6, 6).requires_grad_(), torch.tensor([0, 3, 9, 10, 11, 9])
    got, canonical = loss(features, ids), groups[ids]
    want = infonce_oracle(features, canonical, groups, loss.scale)
    torch.testing.assert_close(got, want)
    inputs = (features, loss.logit_scale)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))
    unmasked = infonce_oracle(features, canonical, groups, loss.scale, mask=False)
    assert float((unmasked - want).detach()) > 0.01


@pytest.mark.parametrize("kind", ["bank", "infonce"])
def test_rows_that_are_not_valid_do_not_exist(kind: str) -> None:
    loss, ids = make(kind, bank=BANK), torch.tensor([1, 2, 3, 4, -1])
    features, valid = unit(5, 6), torch.tensor([True, True, False, True, False])
    features[4] = torch.nan
    features.requires_grad_()
    got = loss(features, ids, valid)
    kept = features.detach()[valid].requires_grad_()
    want = loss(kept, ids[valid])
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, features)
    torch.testing.assert_close(gradient[valid], torch.autograd.grad(want, kept)[0])
    assert not gradient[~valid].any()
    assert float(loss(features, ids, torch.zeros(5, dtype=torch.bool)).detach()) == 0.0


def test_temperature_is_learned_or_fixed() -> None:
    learned = ContrastiveLoss(LossConfig(temperature=0.07), bank=BANK.float())
    fixed = ContrastiveLoss(LossConfig(temperature=0.07, learn_temperature=False), bank=BANK.float())
    assert [name for name, _ in learned.named_parameters()] == ["logit_scale"]
    assert not list(fixed.parameters())
    assert list(fixed.state_dict()) == list(learned.state_dict()) == ["logit_scale"]
    for loss in (learned, fixed):
        torch.testing.assert_close(loss.scale.detach(), torch.tensor(1 / 0.07))


def test_the_scale_stops_at_100_and_comes_back() -> None:
    loss = make(bank=BANK)
    nn.init.constant_(loss.logit_scale, MAX_LOGIT_SCALE + 1.0)
    assert float(loss.scale.detach()) == pytest.approx(100.0)
    (outward,) = torch.autograd.grad(-loss.scale, loss.logit_scale)
    (inward,) = torch.autograd.grad(loss.scale, loss.logit_scale)
    assert float(outward) == 0.0
    assert float(inward) == pytest.approx(100.0)
    nn.init.constant_(loss.logit_scale, 1.0)
    torch.testing.assert_close(torch.autograd.grad(-loss.scale, loss.logit_scale)[0], -loss.scale.detach())


def test_the_bank_moves_with_the_module_but_is_neither_stored_nor_sent() -> None:
    loss = make(bank=BANK, groups=GROUPS)
    assert loss.bank.dtype == torch.float64
    assert not list(loss.buffers())
    moved = ContrastiveLoss(LossConfig(), bank=BANK.float(), groups=GROUPS).to("meta")
    assert moved.bank.device.type == "meta"
    assert moved.groups is not None
    assert moved.groups.device.type == "meta"
    assert make(bank=BANK).groups is None


def test_autocast_does_not_change_the_loss() -> None:
    for kind in ("bank", "infonce"):
        loss = ContrastiveLoss(LossConfig(kind=kind), bank=BANK.float())  # type: ignore[arg-type]
        features, ids = unit(4, 6).float(), torch.arange(4)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(features, ids)
        assert torch.equal(inside, loss(features, ids))


@pytest.mark.parametrize("groups", [None, torch.arange(300) // 2], ids=["distinct", "groups"])
def test_products_of_bfloat16(groups: Tensor | None) -> None:
    """Loss and gradient are those of the rounded problem; nothing is rounded where nothing is multiplied with the bank."""
    bank, features, ids = unit(300, 64, seed=1).float(), unit(9, 64).float().requires_grad_(), torch.arange(9) * 31
    bank = bank if groups is None else bank[groups]
    config = LossConfig(temperature=0.1, label_smoothing=0.1)
    loss = ContrastiveLoss(config, bank=bank, groups=groups, products=torch.bfloat16)
    got = loss(features, ids)
    exact = ContrastiveLoss(config, bank=bank.bfloat16().float(), groups=groups).double()
    rounded = features.detach().bfloat16().double().requires_grad_()
    want = exact(rounded, ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(want, rounded)[0]
    assert (torch.autograd.grad(got, features)[0].double() - wanted).norm() < 4e-3 * wanted.norm()
    assert loss.bank.dtype == torch.float32
    infonce = LossConfig(kind="infonce")
    same = [ContrastiveLoss(infonce, bank=bank, groups=groups, products=dtype)(features, ids) for dtype in (torch.bfloat16, torch.float32)]
    assert torch.equal(*same)


def test_a_perfect_prediction_has_no_gradient_in_bfloat16_either() -> None:
    """A target of unrounded captions would pull at it for ever."""
    bank, ids = unit(300, 64, seed=1).float(), torch.arange(20)
    loss = ContrastiveLoss(LossConfig(temperature=0.01, learn_temperature=False), bank=bank, products=torch.bfloat16)
    features = bank[ids].requires_grad_()
    gradient = torch.autograd.grad(loss(features, ids) * len(ids), features)[0].norm()
    rounding = loss.scale * (bank - bank.bfloat16().float())[ids].norm()
    assert gradient < 0.02 * rounding
    loss.targets = lambda caption_ids: bank[caption_ids]  # type: ignore[method-assign]
    assert torch.autograd.grad(loss(features, ids) * len(ids), features)[0].norm() > 0.5 * rounding


def test_training_with_the_operation_and_with_the_definition_is_the_same() -> None:
    """Convergence: the same 40 losses, whichever of the two computes them."""
    bank, ids = unit(30, 8, seed=3).float(), torch.arange(20)
    inputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(5))

    def run(fast: bool) -> list[float]:
        torch.manual_seed(0)
        model, loss = nn.Linear(10, 8), ContrastiveLoss(LossConfig(), bank=bank)
        optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.02)
        losses = []
        for _ in range(40):
            features = F.normalize(model(inputs), dim=-1)
            value = (
                loss(features, ids) if fast else F.cross_entropy(loss.logit_scale.clamp(max=math.log(100)).exp() * features @ bank.T, ids)
            )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    fast, plain = run(True), run(False)
    assert fast == pytest.approx(plain, rel=2e-3)
    assert fast[-1] < 0.7 * fast[0]
