"""Arithmetic of a meta-step, counted from shapes: what the mathematics asks for, whoever does it.

Counted: products and sums of convolutions and of the linear head, zeros of the padding included. Not counted:
batch norm, activation, pooling, losses, Adam (under 2 % here), and whatever an engine computes twice.
"""

from __future__ import annotations

from itertools import pairwise

from benchmarks.cases import Case

BLOCKS = 4
KERNEL = 9  # 3x3


def layer_flops(case: Case) -> list[int]:
    """One example's forward pass through every convolution, and through the head."""
    channels, height, width = case.image
    flops = []
    for inputs, outputs in pairwise([channels] + [case.filters] * BLOCKS):
        flops.append(2 * KERNEL * inputs * outputs * height * width)
        height, width = height // 2, width // 2
    return [*flops, 2 * case.filters * height * width * case.ways]


def gradient_flops(layers: list[int]) -> int:
    """Forward, weights' gradient, inputs' gradient; images want no gradient."""
    first, *others = layers
    return 2 * first + 3 * sum(others)


def hessian_flops(layers: list[int]) -> int:
    """A Hessian-vector product, the forward pass and the gradient being there already.

    Of y = x * w and its two gradients, along a direction v of the weights: v * x and w * dx make the
    gradient of dL/dy; dL/dy * dx, v * dL/dy and the two gradients of y complete it. Six products a layer;
    the first has neither dx nor a gradient of x, which leaves two.
    """
    first, *others = layers
    return 2 * first + 6 * sum(others)


def meta_step_flops(case: Case) -> int:
    """Every inner step's support gradient and query gradient; in second order its Hessian product too."""
    layers = layer_flops(case)
    support, query = case.ways * case.shots, case.ways * case.queries
    a_step = (support + query) * gradient_flops(layers)
    if not case.first_order:
        a_step += support * hessian_flops(layers)
    return case.tasks * case.inner_steps * a_step
