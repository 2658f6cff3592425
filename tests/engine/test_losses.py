"""Losses of --loss, compared with torch's own, the default engines, closed forms and central differences."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import CPU, central_difference, unit_vector
from helpers.derivative_cases import BY_HAND, WAYS, assert_equal_measurements, measured_by, prepared
from helpers.engine_cases import IMAGE, random_episodes, small_config
from helpers.loss_cases import cross_entropy, focal, linear, margin, own, weighted

from mamlctl.core.literals import LOSSES
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.adjoint import adjoint
from mamlctl.engine.algorithms.compiled_mlp import available, compiled
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.conv4 import Conv4Derivatives
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, evaluate
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.kernels.head import LossHead, TorchHead
from mamlctl.engine.nets.base import CLASSIFICATION, REGRESSION, HeadNet, objective_of
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.nets.factory import Parts
from mamlctl.engine.nets.losses import BUILT_IN, objective_with
from mamlctl.engine.training.cuda_graphs import Captured, runner_of
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

OWN = "loss.py:fn"


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal_to(one, two, tolerance=1e-11):
    """Whether all tensors of two meta-gradients are equal, relative to their largest elements."""
    assert one.keys() == two.keys()
    largest = max(float(grad.abs().max()) for grad in two.values())
    for name, grad in two.items():
        scale = max(float(grad.abs().max()), 1e-3 * largest)  # the sum of a head's rows may be 0
        assert float((one[name] - grad).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("name", "function"), [("mse", F.mse_loss), ("mae", F.l1_loss), ("huber", F.huber_loss)]
)
@pytest.mark.parametrize("targets", [1, 3])
def test_built_in_losses_of_values_are_torchs_own(name, function, targets):
    outputs, y = 2 * normal(4, 5, targets), normal(4, 5, targets, seed=1)
    outputs.requires_grad_()
    loss_T = BUILT_IN[name](outputs, y[..., 0] if targets == 1 else y)
    expected = torch.stack([function(outputs[task], y[task]) for task in range(4)])
    assert torch.allclose(loss_T, expected, rtol=1e-14)
    grads = [
        torch.autograd.grad(losses.sum(), outputs, retain_graph=True)[0] for losses in (loss_T, expected)
    ]
    assert torch.allclose(*grads, rtol=1e-13)


def test_the_default_loss_is_the_same_object_as_without_the_setting():
    assert BUILT_IN.keys() == LOSSES.keys()
    for shape, name in ((IMAGE, "cross_entropy"), ((1,), "mse")):
        objective = objective_of(shape)
        assert objective_with(shape, None, None) is objective is objective_with(shape, name, None)
        assert objective.has_default_loss
        assert not objective_with(shape, OWN, own(cross_entropy)).has_default_loss
    assert not objective_with((1,), "huber", None).has_default_loss
    assert objective_with((1,), "huber", None).score is REGRESSION.score
    outputs, y = normal(2, 6, 3), torch.arange(6).remainder(3).expand(2, -1)
    assert torch.allclose(own(cross_entropy)(outputs, y), CLASSIFICATION.loss(outputs, y), rtol=1e-14)


def gradients(config, epochs, parts=None, image=IMAGE):
    """The results of meta-steps in some epochs of a new learner."""
    net, state = build(config, image, CPU, classes=7, parts=parts or Parts())
    step, episodes = MetaStep(config, net, state), random_episodes(config, image=image)
    class_TN = torch.arange(2 * config.ways).view(2, -1)
    episodes = replace(episodes, class_TN=class_TN)
    return [step.measure(episodes, epoch, measure_all=True) for epoch in epochs]


LOOPS = [
    name
    for name, entry in ALGORITHMS.items()
    if not ("loss" in entry.unsupported or entry.needs_rewards or name == "scratch")
]


@pytest.mark.parametrize("engine", ["adjoint", "plain"])
@pytest.mark.parametrize("algo", LOOPS)
def test_a_copy_of_the_cross_entropy_gives_the_gradient_of_the_built_in_one(algo, engine):
    config = small_config(algo=algo, engine=engine)
    usual = gradients(config, [0])
    copied = gradients(replace(config, loss=OWN), [0], Parts(loss=own(cross_entropy)))
    for result, expected in zip(copied, usual, strict=True):
        equal_to(result.grads, expected.grads)
        assert torch.allclose(result.meta_loss, expected.meta_loss, rtol=1e-12)


@pytest.mark.parametrize("improvements", [("msl",), ("lslr",), ("da",), ("msl", "lslr", "da", "bnwb")])
@pytest.mark.parametrize("net", ["conv4", "mlp", "resnet12"])
def test_the_copy_works_with_improvements_in_both_orders(net, improvements):
    """With --da the first epochs are first order, and the last ones second order."""
    image = (1, 16, 16)
    config = small_config(net=net, **dict.fromkeys(improvements, True), filters=4 if net != "resnet12" else 2)
    usual = gradients(config, [0, 9], image=image)
    copied = gradients(replace(config, loss=OWN), [0, 9], Parts(loss=own(cross_entropy)), image)
    for result, expected in zip(copied, usual, strict=True):
        equal_to(result.grads, expected.grads)
    first = gradients(replace(config, first_order=True, da=False), [0], image=image)
    copied = gradients(
        replace(config, first_order=True, da=False, loss=OWN), [0], Parts(loss=own(cross_entropy)), image
    )
    equal_to(copied[0].grads, first[0].grads)


def test_body_epochs_use_the_loss_too():
    config = small_config(body_epochs=1, loss=OWN)
    (usual,) = gradients(replace(config, loss=None), [0])
    (copied,) = gradients(config, [0], Parts(loss=own(cross_entropy)))
    (other,) = gradients(config, [0], Parts(loss=own(focal)))
    equal_to(copied.grads, usual.grads)
    assert float(other.meta_loss) != pytest.approx(float(usual.meta_loss), rel=1e-3)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("loss", [focal, margin, linear], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("way", ["autograd", *BY_HAND])
def test_hand_written_derivatives_of_the_body_take_any_loss(way, loss, first_order):
    config, net, state, episodes = prepared(algo="maml++", da=False)
    net = replace(net, objective=replace(CLASSIFICATION, loss=own(loss)))
    derivatives = WAYS[way](net)
    if isinstance(derivatives, Conv4Derivatives):
        chosen = select_derivatives(net, state.example_tensor)
        assert isinstance(chosen, Conv4Derivatives) and chosen.make_head.func is LossHead
        derivatives = replace(derivatives, make_head=chosen.make_head)
    learner = config, net, state, episodes, first_order
    result = measured_by(adjoint, *learner, derivatives=derivatives)
    assert_equal_measurements(result, measured_by(unrolled, *learner), state)


def test_the_default_head_is_used_for_the_default_loss_only():
    _, net, state, _ = prepared()
    assert select_derivatives(net, state.example_tensor).make_head is TorchHead


def test_a_linear_loss_has_no_second_derivatives():
    """The head alone is linear too, so that its gradients do not depend on its weights."""
    net = HeadNet(3, replace(CLASSIFICATION, loss=own(linear)))
    x, y = normal(2, 6, 4), torch.arange(6).remainder(3).expand(2, -1)
    fast = {"linear.weight": normal(2, 3, 4, seed=1), "linear.bias": normal(2, 3, seed=2)}
    state = MetaState({}, {}, {})
    gradient = Autograd(net).prepare(x, y).gradient(fast, state.norm_pass(0), keep=True)
    products, _ = gradient.product({name: torch.ones_like(weight) for name, weight in fast.items()})
    assert all(not bool(product.any()) for product in products.values())


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient_of_a_weighted_squared_error_has_its_closed_form(first_order):
    """A linear model: the loss is sum_n c_n m_n |x w_n - y_n|^2 / E, and its Hessian 2 c_n X^T m_n X / E."""
    tasks, examples, inputs, targets, rate = 3, 4, 2, 2, 0.02
    slow = {"linear.weight": normal(targets, inputs), "linear.bias": normal(targets, seed=1)}
    sets = [normal(tasks, examples, inputs, seed=seed) for seed in (2, 3)]
    values = [normal(tasks, examples, targets, seed=seed) for seed in (4, 5)]
    state = MetaState(
        {name: weight.requires_grad_() for name, weight in slow.items()},
        {},
        {name: torch.full((1,), rate, dtype=torch.float64) for name in slow},
    )
    net = HeadNet(targets, replace(REGRESSION, loss=own(weighted)))
    episodes = Episodes(sets[0], values[0], sets[1], values[1])
    result = unrolled(net, state, episodes, MetaStepRequest(1, (1.0,), first_order, measure_all=False))
    start = np.concatenate(
        [slow["linear.weight"].detach().numpy().T, slow["linear.bias"].detach().numpy()[None]]
    )
    expected, losses = [], []
    for task in range(tasks):
        x_E = [np.concatenate([part[task].numpy(), np.ones((examples, 1))], 1) for part in sets]
        y_E = [part[task].numpy() for part in values]
        counts = [np.array([1, 2]) * (1 + np.abs(y)) for y in y_E]

        def slope(w, at, x_E=x_E, y_E=y_E, counts=counts):
            return 2 * x_E[at].T @ (counts[at] * (x_E[at] @ w - y_E[at])) / examples

        moved = start - rate * slope(start, 0)
        gradient = slope(moved, 1)
        if not first_order:
            along = [
                2 * x_E[0].T @ (counts[0][:, n, None] * x_E[0]) / examples @ gradient[:, n]
                for n in range(targets)
            ]
            gradient = gradient - rate * np.stack(along, 1)
        expected.append(gradient)
        losses.append((counts[1] * (x_E[1] @ moved - y_E[1]) ** 2).sum(1).mean())
    mean = np.mean(expected, 0)
    assert np.allclose(result.grads["linear.weight"].numpy(), mean[:-1].T, rtol=1e-12, atol=1e-14)
    assert np.allclose(result.grads["linear.bias"].numpy(), mean[-1], rtol=1e-12, atol=1e-14)
    assert float(result.meta_loss) == pytest.approx(np.mean(losses), rel=1e-13)


@pytest.mark.parametrize("loss", ["huber", "mae"])
def test_meta_gradients_of_regression_match_central_differences(loss):
    config = small_config(net="mlp", ways=1, hidden="5", loss=loss, lslr=True, msl=True)
    net, state = build(config, (2,), CPU, targets=2)
    episodes = Episodes(
        normal(2, 6, 2), 3 * normal(2, 6, 2, seed=1), normal(2, 5, 2, seed=2), normal(2, 5, 2)
    )
    step = MetaStep(config, net, state)
    result = step.measure(episodes, 0, measure_all=False)
    drawn = torch.Generator().manual_seed(3)
    for name, tensor in state.learnable().items():
        for _ in range(3):
            at = tuple(int(torch.randint(size, (), generator=drawn)) for size in tensor.shape)
            slope = central_difference(
                lambda: step.measure(episodes, 0, measure_all=False).meta_loss,
                tensor,
                unit_vector(tensor, at),
                1e-6,
            )
            assert slope == pytest.approx(float(result.grads[name][at]), rel=1e-6, abs=1e-8), (name, at)


def test_code_in_c_is_for_the_squared_error_only():
    config = small_config(net="mlp", ways=1, hidden="5", engine="compiled", loss="huber")
    net, state = build(config, (1,), CPU)
    assert not available(net, state.example_tensor)
    squared, _ = build(replace(config, loss="mse"), (1,), CPU)
    assert squared.objective is REGRESSION
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    episodes = Episodes(normal(2, 6, 1), normal(2, 6, seed=1), normal(2, 5, 1, seed=2), normal(2, 5, seed=3))
    for first_order, weights in itertools.product((False, True), ((0.2, 0.3, 0.5), (0.0, 0.0, 1.0))):
        request = MetaStepRequest(3, weights, first_order, measure_all=True)
        result, expected = (part(net, state, episodes, request) for part in (compiled, unrolled))
        equal_to(result.grads, expected.grads, 0.0)
    other = unrolled(squared, state, episodes, request)
    assert float(result.meta_loss) != pytest.approx(float(other.meta_loss), rel=1e-3)


def test_meta_steps_with_the_users_loss_are_not_recorded_as_cuda_graphs():
    for loss, parts, kind in (
        (None, Parts(), Captured),
        (OWN, Parts(loss=own(cross_entropy)), MetaStep),
    ):
        config = small_config(loss=loss)
        step = MetaStep(config, *build(config, IMAGE, CPU, parts=parts))
        step.device = torch.device("cuda")
        assert type(runner_of(step)) is kind


def test_an_evaluation_measures_the_loss_beside_the_score():
    """The inner loop descends the loss of the run, and both are means over the query set."""
    config = small_config(net="mlp", ways=1, hidden="5", loss="huber", inner_steps=1)
    net, state = build(config, (1,), CPU)
    episodes = Episodes(
        normal(4, 6, 1), 3 * normal(4, 6, seed=1), normal(4, 5, 1, seed=2), normal(4, 5, seed=3)
    )

    class Stream:
        ways, shots, queries, device = 1, 6, 5, CPU

        def episodes(self, first, count):
            parts = {name: part[first : first + count] for name, part in episodes.present().items()}
            return Episodes(**parts)

    scores = evaluate(Autograd(net), [state], Stream(), EvaluationPlan(4, 1, Statistics.OWN)).single[0]
    for task in range(4):
        fast = {name: weight.clone().requires_grad_() for name, weight in state.slow.items()}

        def outputs(x_E1, fast=fast):
            hidden = F.linear(x_E1, fast["hidden1.weight"], fast["hidden1.bias"]).relu()
            return F.linear(hidden, fast["linear.weight"], fast["linear.bias"])[:, 0]

        loss = F.huber_loss(outputs(episodes.support_x_TECHW[task]), episodes.support_y_TE[task])
        grads = torch.autograd.grad(loss, list(fast.values()))
        for weight, grad in zip(fast.values(), grads, strict=True):
            weight.data -= config.inner_lr * grad
        predicted, y = outputs(episodes.query_x_TECHW[task]).detach(), episodes.query_y_TE[task]
        assert scores.last_T[task] == pytest.approx(float(F.mse_loss(predicted, y)), rel=1e-12)
        assert scores.loss_T[task] == pytest.approx(float(F.huber_loss(predicted, y)), rel=1e-12)
    usual = replace(net, objective=REGRESSION)
    assert (
        evaluate(Autograd(usual), [state], Stream(), EvaluationPlan(4, 1, Statistics.OWN)).single[0].loss_T
        is None
    )
