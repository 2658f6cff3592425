"""The meta-gradient compared with central differences, a slow loop, the library higher and closed forms."""

import itertools

import higher
import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import central_difference, unit_vector
from helpers.engine_cases import (
    IMAGE,
    build_uneven,
    random_episodes,
    slow_forward,
    slow_meta_loss,
    small_config,
)

from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

SWITCHES = [
    {},
    {"msl": True},
    {"bnwb": True},
    {"bnrs": True},
    {"lslr": True},
    {"msl": True, "bnwb": True, "bnrs": True, "lslr": True},
]
ORDERS = [{"first_order": False}, {"first_order": True}]
CASES = [a | b for a, b in itertools.product(SWITCHES, ORDERS)]


def case_id(case):
    return "+".join(key for key, value in case.items() if value) or "plain"


def measured(config, net, state, episodes, epoch=0, *, measure_all=False):
    return MetaStep(config, net, state).measure(episodes, epoch, measure_all=measure_all)


def relative(result, expected):
    return float((result - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_whole_meta_batch_equals_one_task_at_a_time(case):
    config = small_config(**case)
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    step = MetaStep(config, net, state)
    result = step.measure(episodes, epoch=0, measure_all=False)
    weights, first_order, _ = step.schedule(0)
    loss = slow_meta_loss(
        state, episodes, inner_steps=config.inner_steps, msl_weights=weights, first_order=first_order
    )
    expected = torch.autograd.grad(loss, list(step.learnable.values()), materialize_grads=True)
    assert float(result.meta_loss) == pytest.approx(float(loss.detach()), abs=1e-12)
    for name, grad in zip(step.learnable, expected, strict=True):
        assert torch.allclose(result.grads[name], grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("case", SWITCHES, ids=case_id)
def test_second_order_matches_central_differences(case):
    config = small_config(**case)
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    grads = measured(config, net, state, episodes).grads
    generator = torch.Generator().manual_seed(2)
    learnable = state.learnable()
    for name, tensor in learnable.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        direction /= direction.norm()
        slope = central_difference(
            lambda: measured(config, net, state, episodes).meta_loss, tensor, direction, 1e-6
        )
        assert float((grads[name] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_learnt_rates_have_exact_gradients_in_first_order_too():
    """The query loss as a function of the last step's rates is the same in first and second order."""
    config = small_config(lslr=True, first_order=True)
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    grads = measured(config, net, state, episodes).grads
    for name, rates in state.rates.items():
        slope = central_difference(
            lambda: measured(config, net, state, episodes).meta_loss, rates, unit_vector(rates, -1), 1e-5
        )
        assert float(grads[f"rate.{name}"][-1]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_first_and_second_order_differ_by_the_hessian_term():
    """After one inner step, g2 = g1 - lr H g1, with H the Hessian of the support loss at the slow weights."""
    settings = {"inner_steps": 1, "meta_batch_size": 1}
    config = small_config(**settings)
    net, state = build(config, IMAGE, torch.device("cpu"))
    episodes = random_episodes(config)
    second = measured(config, net, state, episodes).grads
    first = measured(small_config(**settings, first_order=True), net, state, episodes).grads
    logits = slow_forward(state.slow, state.norm, 0, episodes.support_x_TECHW[0])
    weights = list(state.slow.values())
    grads = torch.autograd.grad(F.cross_entropy(logits, episodes.support_y_TE[0]), weights, create_graph=True)
    along = sum((grad * first[name]).sum() for name, grad in zip(state.slow, grads, strict=True))
    for name, hessian_times_first in zip(state.slow, torch.autograd.grad(along, weights), strict=True):
        expected = first[name] - config.inner_lr * hessian_times_first
        assert torch.allclose(second[name], expected, rtol=1e-9, atol=1e-12), name
        assert relative(second[name], first[name]) > 1e-3, f"both orders are the same for {name}"


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "switches", [{}, {"msl": True}, {"lslr": True}, {"msl": True, "lslr": True}], ids=case_id
)
def test_maml_and_its_improvements_equal_the_library_higher(first_order, switches):
    """The documented loop of higher: its differentiable SGD on torch.nn modules, with rates by `override`."""
    config = small_config(first_order=first_order, **switches)
    net, state = build(config, IMAGE, torch.device("cpu"))
    for number, rate in enumerate(state.rates.values()):
        rate.mul_(torch.linspace(0.5 + 0.1 * number, 1.5, rate.numel(), dtype=rate.dtype))
    episodes = random_episodes(config)
    step = MetaStep(config, net, state)
    result = step.measure(episodes, 0, measure_all=False).grads
    weights, _, _ = step.schedule(0)
    module = _module_like(state, config)
    start = list(module.parameters())
    optimiser = torch.optim.SGD([{"params": [weight]} for weight in start], lr=config.inner_lr)
    expected = [torch.zeros_like(weight) for weight in start]
    rate_grads = [torch.zeros_like(rate) for rate in state.rates.values()]
    for task in range(config.meta_batch_size):
        with higher.innerloop_ctx(
            module, optimiser, copy_initial_weights=False, track_higher_grads=not first_order
        ) as (fast, inner):
            loss = 0
            for number in range(config.inner_steps):
                support = F.cross_entropy(fast(episodes.support_x_TECHW[task]), episodes.support_y_TE[task])
                rates = [rate[min(number, len(rate) - 1)] for rate in state.rates.values()]
                inner.step(support, override={"lr": rates})
                query = F.cross_entropy(fast(episodes.query_x_TECHW[task]), episodes.query_y_TE[task])
                if first_order:
                    # Without tracking, higher gives the gradient at the adapted weights: first-order MAML.
                    grads = torch.autograd.grad(weights[number] * query, fast.parameters())
                    expected = [total + grad for total, grad in zip(expected, grads, strict=True)]
                loss = loss + weights[number] * query
            if not first_order:
                leaves = [*start, *(rate for rate in state.rates.values() if rate.requires_grad)]
                grads = torch.autograd.grad(loss, leaves)
                expected = [total + grad for total, grad in zip(expected, grads, strict=False)]
                rate_grads = [
                    total + grad for total, grad in zip(rate_grads, grads[len(start) :], strict=False)
                ]
    for name, grad in zip(state.slow, expected, strict=True):
        assert torch.allclose(result[name], grad / config.meta_batch_size, rtol=1e-8, atol=1e-12), name
    if config.lslr and not first_order:
        for name, grad in zip(state.rates, rate_grads, strict=True):
            assert torch.allclose(
                result[f"rate.{name}"], grad / config.meta_batch_size, rtol=1e-8, atol=1e-12
            ), name


def _module_like(state, config):
    """Conv4 from torch.nn layers; batch norm has no weights, because MAML does not adapt them."""
    layers = []
    channels = IMAGE[0]
    for _ in range(4):
        layers += [
            torch.nn.Conv2d(channels, config.filters, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(config.filters, affine=False, track_running_stats=False),
            torch.nn.LeakyReLU(0.01),
            torch.nn.MaxPool2d(2),
        ]
        channels = config.filters
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(channels, config.ways)).double()
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), state.slow.values(), strict=True):
            parameter.copy_(weight)
    return module
