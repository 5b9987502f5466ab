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


def orthogonalize(matrix: Float[Tensor, "rows columns"], *, iterations: int) -> Float[Tensor, "rows columns"]:
    """The matrix with its singular values moved to about 1 by Newton-Schulz iterations.

    An iteration X -> p(X X') X multiplies from the left by a polynomial of the Gram matrix G = X X', and G goes to p(G) G p(G). So
    the iterations run on Gram matrices, as small as the shorter side, and only the product of their polynomials meets X: half
    of the arithmetic for a filter of 3x3 pixels, which is nine times as wide as high. The price: rounding errors of G in
    directions that are weaker than they are grow twelvefold with each iteration, which after 3 still is nothing.

    Args:
        matrix: Any floating-point matrix; its scale does not matter.
        iterations: Applications of the quintic, 1 or more; 3 suffice for momentum of a batch of hundreds, 5 for noisy gradients.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + TINY)
    gram, product = x @ x.T, x
    for iteration in range(iterations):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if iteration == 0 else polynomial @ product
        gram = polynomial @ (gram @ polynomial) if iteration + 1 < iterations else gram
    orthogonal: Tensor = product @ x
    return orthogonal.T if tall else orthogonal


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
        orthogonal = [group for group in self.param_groups if group.get("orthogonal")]
        held: list[tuple[nn.Parameter, Tensor]] = []
        for group in orthogonal:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, lr=group["lr"], weight_decay=group["weight_decay"], skip=skip)
                    held.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over parameters without a gradient
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient

    def _update(self, parameter: nn.Parameter, *, lr: float, weight_decay: float, skip: Tensor | None) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state, rows = self.state[parameter], parameter.shape[0]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"] * self.momentum + gradient
        nesterov = gradient + self.momentum * momentum
        update = orthogonalize(nesterov.reshape(rows, -1), iterations=self.iterations).reshape(parameter.shape)
        if parameter.ndim > 2:
            updated = parameter * (rows**0.5 / (parameter.norm() + TINY)) - lr * update
        else:
            stretch = max(1.0, rows / parameter.shape[1]) ** 0.5
            updated = parameter * (1.0 - lr * weight_decay) - lr * stretch * update
        if skip is not None:
            momentum = torch.where(skip > 0, state["momentum"], momentum)
            updated = torch.where(skip > 0, parameter, updated)
        state["momentum"].copy_(momentum)
        parameter.copy_(updated)
