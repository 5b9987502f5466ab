"""The lowest bank-softmax loss that any image embedding could reach: a limit set by the captions, not by the model.

For one caption the loss, as a function of the image feature z, is convex: logsumexp(scale * bank @ z) minus a linear
term. Its minimum over the unit ball, which is on the sphere unless label smoothing puts it inside, is found by
accelerated projected gradient descent (Beck and Teboulle 2009, https://doi.org/10.1137/080716542, FISTA with constant
step). Convexity also yields a certificate: no z is better than F(z) - (<z, g> + |g|), with g the gradient at z.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MAX_ITERATIONS = 300
GOOD_GAP = 0.01
"""Stop when the mean certificate is this tight, in nats: far finer than any decision based on the figure."""
CHECK_EVERY = 10
INSIDE = 0.999
"""A shorter optimum lies inside the ball (label smoothing does that): the best unit vector is searched from there."""
SPHERE_ITERATIONS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class LossFloor:
    """Mean over the sampled captions."""

    loss: float
    """Loss of the best image features found (unit vectors), in nats: the floor is not above it."""
    gap: float
    """How much lower the true floor could be at most."""
    top1: float
    """Share of the sampled captions that their best image feature ranks first."""


def loss_floor(
    text_features: Float[Tensor, "n dim"], *, sample: Int64[Tensor, " m"], scale: float, label_smoothing: float = 0.0
) -> LossFloor:
    """Optimise one image feature per sampled caption against the whole bank.

    Args:
        text_features: The bank; pass distinct rows, since copies of a row cannot be told apart by anything.
        sample: Rows to optimise for.
        scale: 1 / temperature.
        label_smoothing: Share of the target spread over all captions.
    """
    bank = text_features.float()
    target = bank[sample] * (1 - label_smoothing) + bank.mean(0) * label_smoothing
    z = torch.nn.functional.normalize(bank[sample] - bank.mean(0), dim=-1)
    # The Hessian is scale^2 times a covariance under the softmax: at most scale^2 * diameter^2 / 4.
    centre = bank.mean(0)
    radius = float((bank - centre).norm(dim=1).max())
    step = 1.0 / max(scale**2 * radius**2, 1e-6)
    ahead, momentum = z, 1.0
    for iteration in range(MAX_ITERATIONS):
        _, gradient = _loss_and_gradient(ahead, bank, target, scale)
        new = _into_ball(ahead - step * gradient)
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, z, momentum = new + (momentum - 1) / next_momentum * (new - z), new, next_momentum
        if (iteration + 1) % CHECK_EVERY == 0 and float(_gap(z, bank, target, scale).mean()) < GOOD_GAP:
            break
    bound = _loss_and_gradient(z, bank, target, scale)[0] - _gap(z, bank, target, scale)
    on_sphere = torch.nn.functional.normalize(z, dim=-1)
    if float(z.norm(dim=1).min()) < INSIDE:
        # A step of 1 / Lipschitz constant, projected, never raises the loss, on the sphere either.
        for _ in range(SPHERE_ITERATIONS):
            _, gradient = _loss_and_gradient(on_sphere, bank, target, scale)
            on_sphere = torch.nn.functional.normalize(on_sphere - step * gradient, dim=-1)
    loss = _loss_and_gradient(on_sphere, bank, target, scale)[0]
    scores = on_sphere @ bank.T
    own = scores.gather(1, sample.unsqueeze(1))
    top1 = ((scores > own).sum(1) == 0).float().mean()
    return LossFloor(loss=float(loss.mean()), gap=float((loss - bound).mean()), top1=float(top1))


def _loss_and_gradient(
    z: Float[Tensor, "m dim"], bank: Float[Tensor, "n dim"], target: Float[Tensor, "m dim"], scale: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m dim"]]:
    logits = scale * (z @ bank.T)
    normaliser = logits.logsumexp(1)
    gradient = scale * ((logits - normaliser.unsqueeze(1)).exp() @ bank - target)
    return normaliser - scale * (z * target).sum(1), gradient


def _gap(z: Float[Tensor, "m dim"], bank: Float[Tensor, "n dim"], target: Float[Tensor, "m dim"], scale: float) -> Float[Tensor, " m"]:
    _, gradient = _loss_and_gradient(z, bank, target, scale)
    gap: Tensor = (z * gradient).sum(1) + gradient.norm(dim=1)
    return gap


def _into_ball(z: Float[Tensor, "m dim"]) -> Float[Tensor, "m dim"]:
    inside: Tensor = z / z.norm(dim=1, keepdim=True).clamp_min(1)
    return inside
