"""iMAML compared with closed forms and central differences."""

import weakref

import pytest
import torch
from helpers.algorithm_cases import (
    CPU,
    central_difference,
    close,
    joined,
    linear_tasks,
    measured,
    quadratic,
    random_line,
    unit_vector,
)
from helpers.engine_cases import IMAGE, fastest, random_episodes, small_config

from mamlctl.engine.algorithms import imaml as imaml_module
from mamlctl.engine.algorithms.imaml import conjugate_gradient, imaml
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest
from mamlctl.engine.derivatives.conv4 import Conv4Set
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep


def test_implicit_gradient_of_quadratic_tasks_equals_the_closed_form():
    """With Hessian A and proximal p, it is p (A + p)^-1 times the query gradient at the minimum."""
    slow, support, query = random_line()
    net, state, episodes = linear_tasks(*support, slow, inner_lr=0.05, queries=query)
    result = imaml(
        net,
        state,
        episodes,
        MetaStepRequest(2000, (), False, False),
        engine="adjoint",
        proximal=0.7,
        cg_steps=3,
    )
    expected = 0
    for x, y, qx, qy in zip(*support, *query, strict=True):
        hessian, gradient = quadratic(x, y)
        shifted = hessian + 0.7 * torch.eye(3).double()
        v0 = joined(slow).detach()
        v = v0 - torch.linalg.solve(shifted, gradient(v0))
        expected = expected + 0.7 * torch.linalg.solve(shifted, quadratic(qx, qy)[1](v)) / len(support[0])
    assert close(joined(result.grads), expected, 1e-10)


def test_conjugate_gradient_solves_every_task_and_stops_without_positive_curvature():
    generator = torch.Generator().manual_seed(0)
    root_TDD = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    matrix_TDD = root_TDD @ root_TDD.transpose(1, 2) + torch.eye(5)
    matrix_TDD[2] = -matrix_TDD[2]
    b_TD = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def product(direction):
        both = torch.cat([direction["a"], direction["b"]], 1).unsqueeze(2)
        out = (matrix_TDD @ both).squeeze(2)
        return {"a": out[:, :2], "b": out[:, 2:]}

    result = conjugate_gradient(product, {"a": b_TD[:, :2], "b": b_TD[:, 2:]}, steps=5)
    x_TD = torch.cat([result["a"], result["b"]], 1)
    assert close(x_TD[:2], torch.linalg.solve(matrix_TDD[:2], b_TD[:2]), 1e-8)
    assert (x_TD[2] == 0).all()
    beyond = conjugate_gradient(product, {"a": b_TD[:, :2], "b": b_TD[:, 2:]}, steps=50)
    assert close(beyond["a"][:2], result["a"][:2], 1e-8)


def test_implicit_gradient_of_a_network_matches_central_differences():
    """Solve the inner problem to convergence, and differentiate the query loss by weights and norm.

    Only the head is adapted, because a minimum over the body tends to be at a kink of an activation.
    """
    settings = {
        "proximal": 0.5,
        "cg_steps": 15,
        "inner_steps": 150,
        "inner_lr": 0.3,
        "meta_batch_size": 1,
    }
    step, result = measured("imaml", uneven=False, adapts="head", **settings)
    episodes = random_episodes(step.config)
    for name in ("conv3.weight", "linear.bias", "norm2.weight"):
        tensor, at = step.learnable[name], (0,) * step.learnable[name].dim()
        slope = central_difference(
            lambda: step.measure(episodes, 0, measure_all=False).meta_loss,
            tensor,
            unit_vector(tensor, at),
            1e-6,
        )
        assert float(result.grads[name][at]) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_implicit_gradient_frees_the_gradients_of_earlier_inner_steps(monkeypatch):
    """At any time at most the last two gradients are alive, so memory does not grow with the steps."""
    config = small_config(algo="imaml", inner_steps=12)
    net, state = build(config, IMAGE, CPU)
    real = fastest(net)
    gradients, alive = [], []

    class Watched:
        net = real.net

        def prepare(self, *args):
            return WatchedSet(**vars(real.prepare(*args)))

    class WatchedSet(Conv4Set):
        def gradient(self, *args, keep=False):
            gradient = super().gradient(*args, keep=keep)
            gradients.append(weakref.ref(gradient.fast["conv1.weight"]))
            alive.append(sum(ref() is not None for ref in gradients))
            return gradient

    monkeypatch.setattr(imaml_module, "select_derivatives", lambda *args: Watched())
    MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    assert len(alive) == 12 + 2
    assert max(alive) <= 2
