"""ANIL and BOIL compared with MAML whose other inner rates are 0."""

import pytest
import torch
from helpers.algorithm_cases import close, measured
from helpers.engine_cases import build_uneven, random_episodes, small_config

from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.training.meta_step import MetaStep

ANIL = [
    {},
    {"msl": True, "msl_epochs": 5},
    {"lslr": True},
    {"first_order": True},
    {"lslr": True, "first_order": True},
]


@pytest.mark.parametrize("settings", ANIL, ids=str)
def test_anil_equals_the_unrolled_loop_over_the_whole_network(settings):
    """ANIL passes the body once, --engine plain passes it at every inner step."""
    _, fast = measured("anil", **settings)
    _, plain = measured("anil", engine="plain", **settings)
    assert fast.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        assert close(fast.grads[name], grad, 1e-8), name
    for part in ("query_losses", "query_scores"):
        one, two = getattr(fast, part), getattr(plain, part)
        assert one.keys() == two.keys()
        assert all(float(one[step]) == pytest.approx(float(two[step])) for step in one)


def test_anil_is_maml_with_body_rates_of_zero():
    step, anil = measured("anil")
    config = small_config(algo="maml")
    net, state = build_uneven(config)
    for name, rate in state.rates.items():
        rate.copy_(step.state.rates[name] if name in HEAD else torch.zeros_like(rate))
    state.slow, state.norm = step.state.slow, step.state.norm
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name, grad in maml.grads.items():
        assert close(anil.grads[name], grad, 1e-8), name


def test_boil_is_maml_with_head_rates_of_zero():
    step, boil = measured("boil")
    config = small_config(algo="maml")
    net, state = build_uneven(config)
    for name, rate in state.rates.items():
        rate.copy_(torch.zeros_like(rate) if name in HEAD else step.state.rates[name])
    state.slow, state.norm = step.state.slow, step.state.norm
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name, grad in maml.grads.items():
        assert close(boil.grads[name], grad), name
    assert float(boil.grads["linear.weight"].abs().max()) > 0  # the head is not adapted, but meta-learnt
