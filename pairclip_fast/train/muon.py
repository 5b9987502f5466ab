"""Muon: momentum whose matrix is replaced by its nearest orthogonal one before it is subtracted.

A gradient of a weight matrix is dominated by few directions; making all singular values of the update equal lets the rare
directions learn as fast as the common ones. It costs three matrix products per iteration and weight, on matrices that do not
grow with the batch.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), and the normalised-filter form
of K. Jordan's CIFAR-10 speedrun (airbench, 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that pushes singular values towards 1 fastest (Jordan et al. 2024): it does not converge to
exactly 1 but into about [0.7, 1.2], which trains as well and needs fewer iterations."""
TINY = 1e-7
BATCHED = ("cuda",)
"""Devices on which parameters of one shape are updated together."""


def orthogonalize(matrices: Float[Tensor, "*stack rows columns"], *, iterations: int) -> Float[Tensor, "*stack rows columns"]:
    """Each matrix with its singular values moved to about 1 by Newton-Schulz iterations.

    An iteration X -> p(X X') X multiplies from the left by a polynomial of the Gram matrix G = X X', and G goes to p(G) G p(G). So
    the iterations run on Gram matrices, as small as the shorter side, and only the product of their polynomials meets X: half
    of the arithmetic for a filter of 3x3 pixels, which is nine times as wide as high. The price: rounding errors of G in
    directions that are weaker than they are grow twelvefold with each iteration, which after 3 still is nothing.

    Args:
        matrices: Any floating-point ones; their scale does not matter.
        iterations: Applications of the quintic, 1 or more; 3 suffice for momentum of a batch of hundreds, 5 for noisy gradients.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + TINY)
    gram, product = x @ x.mT, x
    for iteration in range(iterations):
        polynomial = b * gram + c * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if iteration == 0 else polynomial @ product
        gram = polynomial @ (gram @ polynomial) if iteration + 1 < iterations else gram
    orthogonal: Tensor = product @ x
    return orthogonal.mT if tall else orthogonal


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups marked `orthogonal`, AdamW for the others, behind one `step`.

    The Muon update is SGD with Nesterov momentum, orthogonalised. Filters [out, in, kh, kw] are taken as matrices
    [out, in*kh*kw] and kept at Frobenius norm sqrt(out): what follows them is a normalisation, to which their scale is
    invisible, so it would only blur the learning rate. Matrices are decayed instead, as by AdamW.

    Like the fused AdamW it honours `found_inf`: where that is not zero, nothing changes, and nobody waits for the device.

    Args:
        groups: Parameter groups; one with `"orthogonal": True` has parameters of two or more dimensions only, and its
            `lr` is the length of an update relative to an orthogonal weight.
        momentum: Running-average factor of the Muon groups.
        iterations: Newton-Schulz iterations.
        **adamw: Keywords of `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, iterations: int = 3, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum, self.iterations = momentum, iterations

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "gradients are taken as they are"
        skip: Tensor | None = getattr(self, "found_inf", None)
        held: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if group.get("orthogonal"):
                trained = [parameter for parameter in group["params"] if parameter.grad is not None]
                for alike in _together(trained):
                    self._update(alike, lr=group["lr"], weight_decay=group["weight_decay"], skip=skip)
                held += [(parameter, parameter.grad) for parameter in trained if parameter.grad is not None]
                for parameter in trained:
                    parameter.grad = None  # AdamW passes over parameters without a gradient
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient

    def _update(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, skip: Tensor | None) -> None:
        """Parameters of one shape."""
        rows = parameters[0].shape[0]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        kept = [self.state[parameter]["momentum"] for parameter in parameters]
        before, weights = _stacked(kept), _stacked([*parameters])
        gradient = _stacked([parameter.grad for parameter in parameters if parameter.grad is not None])
        momentum = before * self.momentum + gradient
        nesterov = gradient + self.momentum * momentum
        matrices = nesterov.flatten(2) if len(parameters) > 1 else nesterov[0].flatten(1)
        update = orthogonalize(matrices, iterations=self.iterations).reshape(weights.shape)
        if weights.ndim > 3:
            norms = torch.linalg.vector_norm(weights, dim=tuple(range(1, weights.ndim)), keepdim=True)
            updated = weights * (rows**0.5 / (norms + TINY)) - lr * update
        else:
            stretch = max(1.0, rows / weights.shape[2]) ** 0.5
            updated = weights * (1.0 - lr * weight_decay) - lr * stretch * update
        if skip is not None:
            momentum = torch.where(skip > 0, before, momentum)
            updated = torch.where(skip > 0, weights, updated)
        torch._foreach_copy_(kept, list(momentum))
        torch._foreach_copy_([*parameters], list(updated))


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _together(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those of one shape at once on a GPU, where starting so many small operations takes longer than their arithmetic. On a CPU each
    for itself: batched products are slower there than single ones."""
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for number, parameter in enumerate(parameters):
        alone = () if parameter.device.type in BATCHED else (number,)
        groups.setdefault((*parameter.shape, *alone), []).append(parameter)
    return list(groups.values())
