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
    """ANIL passes through the body once, --engine plain at every inner step."""
    _, fast = measured("anil", **settings)
    _, plain = measured("anil", engine="plain", **settings)
    assert fast.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        assert close(fast.grads[name], grad, 1e-8), name
    for part in ("query_losses", "query_scores"):
        one, two = getattr(fast, part), getattr(plain, part)
        assert one.keys() == two.keys()
        assert all(float(one[step]) == pytest.approx(float(two[step])) for step in one)


@pytest.mark.parametrize(("algo", "adapts_head", "tolerance"), [("anil", True, 1e-8), ("boil", False, 1e-9)])
def test_anil_and_boil_are_maml_with_other_rates_of_zero(algo, adapts_head, tolerance):
    step, result = measured(algo)
    config = small_config(algo="maml")
    net, state = build_uneven(config)
    for name, rate in state.rates.items():
        adapted = (name in HEAD) == adapts_head
        rate.copy_(step.state.rates[name] if adapted else torch.zeros_like(rate))
    state.slow, state.norm = step.state.slow, step.state.norm
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name, grad in maml.grads.items():
        assert close(result.grads[name], grad, tolerance), name
        assert float(result.grads[name].abs().max()) > 0, f"{name} is meta-learnt, adapted or not"
