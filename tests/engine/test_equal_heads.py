"""UNICORN-MAML and the zeroing trick compared with other mathematics, and their symmetry in the labels."""

import numpy as np
import pytest
import torch
from helpers.data_cases import image_stream
from helpers.derivative_cases import CPU
from helpers.engine_cases import IMAGE, fastest, random_episodes, slow_meta_loss, small_config
from helpers.trainer_cases import patterns

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.label_permutations import LabelPermutations
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, evaluate
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

EQUAL = ("unicorn-maml", "maml-zero")


def learner(algo, **settings):
    config = small_config(algo=algo, **settings)
    net, state = build(config, IMAGE, CPU)
    return config, net, state, random_episodes(config)


def trained(algo):
    """After three meta-steps on the same tasks."""
    config, net, state, episodes = learner(algo, meta_lr=0.01)
    step = MetaStep(config, net, state)
    optimizer = ALGORITHMS[algo].optimizer(state.learnable(), config)
    for _ in range(3):
        optimizer.step(step.measure(episodes, 0, measure_all=False).grads)
    return step, episodes


@pytest.mark.parametrize("first_order", [False, True])
def test_unicorn_is_the_gradient_of_one_row_that_all_classes_share(first_order):
    """The slow loop with the head as an expanded leaf: autograd sums over the rows."""
    config, net, state, episodes = learner("unicorn-maml", first_order=first_order)
    result = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    leaves = {name: (weight[:1] if name in HEAD else weight).detach() for name, weight in state.slow.items()}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    state.slow = {name: leaf.expand(state.slow[name].shape) for name, leaf in leaves.items()}
    loss = slow_meta_loss(
        state, episodes, inner_steps=config.inner_steps, msl_weights=(0, 0, 1), first_order=first_order
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert torch.allclose(result.meta_loss, loss.detach())
    for name, expected in zip(leaves, grads, strict=True):
        assert torch.allclose(
            result.grads[name], expected.expand_as(result.grads[name]), rtol=1e-9, atol=1e-13
        )


def test_zeroing_is_maml_from_a_head_of_zeros_that_stays_zero():
    config, net, state, episodes = learner("maml-zero")
    result = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    plain = small_config(algo="maml")
    expected = MetaStep(plain, net, state).measure(episodes, 0, measure_all=True)
    for name in HEAD:
        assert not state.slow[name].any()
        assert float(expected.grads[name].abs().max()) > 0
        assert not result.grads[name].any()
        expected.grads[name] = result.grads[name]
    for name, grad in expected.grads.items():
        assert torch.equal(result.grads[name], grad)


@pytest.mark.parametrize("algo", [*EQUAL, "maml"])
def test_label_permutations_have_no_spread(algo):
    """Each task's accuracy is that of its other label orders, exactly; with `maml` it is not."""
    step, _ = trained(algo)
    common = {"split": "test", "name": "patterns", "ways": 3, "shots": 1, "queries": 3, "rotations": "none"}
    stream = image_stream(patterns(), np.arange(8), dtype=torch.float64, ink=1, **common)
    tasks, orders = 12, 3
    plan = EvaluationPlan(tasks * orders, step.config.inner_steps, Statistics.OWN)
    scores = evaluate(fastest(step.net), [step.state], LabelPermutations(stream, orders), plan).single[0]
    spread = np.ptp(scores.last_T.reshape(tasks, orders), axis=1)
    assert (spread == 0).all() == (algo in EQUAL)


@pytest.mark.parametrize("algo", [*EQUAL, "maml"])
def test_the_order_of_the_labels_has_no_effect_after_training(algo):
    step, episodes = trained(algo)
    order = torch.tensor([2, 0, 1])
    relabelled = Episodes(
        episodes.support_x_TECHW,
        order[episodes.support_y_TE],
        episodes.query_x_TECHW,
        order[episodes.query_y_TE],
    )
    one, other = (step.measure(tasks, 0, measure_all=True) for tasks in (episodes, relabelled))
    same = all(
        torch.allclose(one.query_losses[k], other.query_losses[k], rtol=1e-9) for k in one.query_losses
    )
    assert same == (algo in EQUAL)
    if algo == "unicorn-maml":
        for name in HEAD:
            rows = step.state.slow[name]
            assert torch.equal(rows, rows[:1].expand_as(rows)) and bool(rows.any())
