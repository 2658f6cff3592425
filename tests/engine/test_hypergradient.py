"""Alpha-MAML learns both learning rates by hypergradients."""

import numpy as np
import pytest
import torch

from mamlctl.engine.algorithms.alpha_maml import Hypergradient


def test_hypergradients_are_the_derivatives_by_the_logarithms_of_both_rates():
    """dL/d log a = a dL/da, and dL/d log b = -b <gradient, previous direction>."""
    weights = {"w": torch.tensor([1.0, 2.0]).double(), "rate.w": torch.tensor([0.5]).double()}
    optimizer = Hypergradient(weights, 0.1, (0.9, 0.999), 0.02)
    seen = []
    optimizer.hyper.step = lambda grads: seen.append({name: float(grad) for name, grad in grads.items()})
    grad = torch.tensor([3.0, -4.0]).double()
    optimizer.step({"w": grad, "rate.w": torch.tensor([7.0]).double()})
    direction = (torch.tensor([1.0, 2.0]).double() - weights["w"]) / 0.1
    assert torch.allclose(direction, torch.sign(grad).double(), atol=1e-6)  # Adam's first step
    assert seen == [{"inner": pytest.approx(0.5 * 7), "meta": pytest.approx(0.0)}]
    later = torch.tensor([1.0, 1.0]).double()
    optimizer.step({"w": later, "rate.w": torch.tensor([0.0]).double()})
    assert seen[1] == {"inner": pytest.approx(0.0), "meta": pytest.approx(-0.1 * float(later @ direction))}


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_hypergradients_correct_a_bad_initial_rate(start):
    """A constant gradient increases the meta rate, an oscillating one decreases it, by hyper_lr per step."""
    weights = {"w": torch.zeros(1).double(), "rate.w": torch.ones(1).double()}
    optimizer = Hypergradient(weights, start, (0.9, 0.999), 0.05)
    for number in range(40):
        sign = 1.0 if start < 1 else (-1.0) ** number
        optimizer.step({"w": torch.full((1,), sign).double(), "rate.w": torch.full((1,), -1.0).double()})
    moved = np.log(optimizer.lr_now() / start)
    assert (1.5 < moved < 3) if start < 1 else (moved < -0.3), moved
    assert 1.9 < np.log(float(weights["rate.w"])) < 2.5
