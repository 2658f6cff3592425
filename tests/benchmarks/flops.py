"""The arithmetic that a meta-step requires, counted from shapes, for any implementation.

Counted: multiplications and additions in convolutions and in the linear head, including zero padding. Not
counted: batch norm, activations, pooling, losses and Adam (under 2 % here), and recomputation by an engine.
"""

from __future__ import annotations

from itertools import pairwise

from benchmarks.cases import Case

BLOCKS = 4
KERNEL = 9  # 3x3


def layer_flops(case: Case) -> list[int]:
    """Return the FLOPs of one example's forward pass: one number per convolution, then the head."""
    channels, height, width = case.image
    flops = []
    for inputs, outputs in pairwise([channels] + [case.filters] * BLOCKS):
        flops.append(2 * KERNEL * inputs * outputs * height * width)
        height, width = height // 2, width // 2
    return [*flops, 2 * case.filters * height * width * case.ways]


def gradient_flops(layers: list[int]) -> int:
    """Return the FLOPs of the forward pass and both gradients; the first layer needs no input gradient."""
    first, *others = layers
    return 2 * first + 3 * sum(others)


def hessian_flops(layers: list[int]) -> int:
    """Return the FLOPs of a Hessian-vector product, given the forward pass and the gradient.

    For a layer y = x * w and a direction v of the weights, the forward tangent dy = x * v + dx * w takes two
    products. The tangents of dL/dw = x * dL/dy and of dL/dx = w * dL/dy take two products each. That is six
    products per layer; the first layer has neither dx nor dL/dx, so two remain.
    """
    first, *others = layers
    return 2 * first + 6 * sum(others)


def meta_step_flops(case: Case) -> int:
    """Return the FLOPs of all inner steps; second order adds a Hessian-vector product to each."""
    layers = layer_flops(case)
    support, query = case.ways * case.shots, case.ways * case.queries
    per_step = (support + query) * gradient_flops(layers)
    if not case.first_order:
        per_step += support * hessian_flops(layers)
    return case.tasks * case.inner_steps * per_step
