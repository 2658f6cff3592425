"""Trust regions: the step that lowers a loss most among those that change the policies by a given divergence.

Schulman et al. 2015 (arXiv:1502.05477), appendix C, with the constants of MAML's published code
(conjugate_gradient_optimizer.py). With g the gradient of the loss, H the second derivative of the mean
divergence between old and new policies at the old ones, and d the size of the trust region,

    H s = g                                   by conjugate gradients
    w_new = w - b^j sqrt(2 d / (s^T H s)) s   for the first j with a lower loss and a divergence of at most d
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CG_STEPS = 10
DAMPING = 1e-5  # added to H
BACKTRACK = 0.8  # b
MOST_TRIALS = 15  # of j

Vector = Tensor  # all learnable numbers, one after another
Measure = Callable[[Vector], tuple[float, float]]  # loss and mean divergence from the old policies


def conjugate_gradients(
    product: Callable[[Vector], Vector], b: Vector, steps: int = CG_STEPS
) -> tuple[Vector, Vector]:
    """Solve H x = b approximately for a positive definite H (Hestenes & Stiefel 1952).

    Args:
        product: computes H v.
        b: the right-hand side.
        steps: the largest number of products.

    Returns:
        x and H x.
    """
    x, residual = torch.zeros_like(b), b
    direction, size = residual, residual.dot(residual)
    for _ in range(steps):
        if float(size) < 1e-10:  # as in the published code
            break
        image = product(direction)
        along = size / direction.dot(image)
        x, residual = x + along * direction, residual - along * image
        smaller = residual.dot(residual)
        direction, size = residual + (smaller / size) * direction, smaller
    return x, b - residual


def trust_region_step(
    old: Vector,
    gradient: Vector,
    product: Callable[[Vector], Vector],
    before: float,
    measure: Measure,
    max_kl: float,
) -> Vector:
    """Compute the new values of the learnable numbers.

    Args:
        old: the learnable numbers w.
        gradient: g.
        product: computes H v.
        before: the loss at the old values.
        measure: the loss and the divergence at other values.
        max_kl: d.

    Returns:
        The old values if no trial is accepted. NaNs if g or a product is not finite, so that the run stops.
    """

    def damped(vector: Vector) -> Vector:
        return product(vector) + DAMPING * vector

    direction, image = conjugate_gradients(damped, gradient)
    curvature = float(direction.dot(image))
    if not math.isfinite(curvature):
        return torch.full_like(old, math.nan)
    if curvature <= 0:  # no direction lowers the loss
        return old
    longest = math.sqrt(2 * max_kl / curvature) * direction
    for trial in range(MOST_TRIALS):
        new = old - BACKTRACK**trial * longest
        loss, divergence = measure(new)
        if loss < before and divergence <= max_kl:
            return new
    return old
