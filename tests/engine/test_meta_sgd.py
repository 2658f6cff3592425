"""Meta-SGD compared with MAML and central differences."""

import pytest
from helpers.algorithm_cases import CPU, central_difference, close, measured, unit_vector
from helpers.engine_cases import IMAGE, random_episodes, small_config

from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep


@pytest.mark.parametrize("engine", ["adjoint", "plain"])
def test_meta_sgd_with_equal_rates_is_maml_and_its_rate_gradients_add_up(engine):
    """The gradients of a tensor's rates, one per weight, add up to that of a single rate for the tensor."""
    _, result = measured("meta-sgd", uneven=False, engine=engine)
    config = small_config(algo="maml", lslr=True)
    net, state = build(config, IMAGE, CPU)
    maml = MetaStep(config, net, state).measure(random_episodes(config), 0, measure_all=False)
    for name in state.slow:
        assert close(result.grads[name], maml.grads[name]), name
        by_weight, by_step = result.grads[f"rate.{name}"], maml.grads[f"rate.{name}"]
        assert by_weight.shape == (1, *state.slow[name].shape)
        assert float(by_weight.sum()) == pytest.approx(float(by_step.sum()), rel=1e-8)


def test_meta_sgd_rate_gradients_match_central_differences_even_for_negative_rates():
    step, _ = measured("meta-sgd")
    episodes, rate = random_episodes(step.config), step.learnable["rate.conv2.weight"]
    at = 0, 1, 2, 0, 0
    rate.detach()[at] = -0.03
    result = step.measure(episodes, 0, measure_all=False)
    slope = central_difference(
        lambda: step.measure(episodes, 0, measure_all=False).meta_loss, rate, unit_vector(rate, at), 1e-5
    )
    assert float(result.grads["rate.conv2.weight"][at]) == pytest.approx(slope, rel=1e-5)
