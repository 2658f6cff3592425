"""Reptile compared with gradient descent and a serial loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import CPU, close, measured
from helpers.data_cases import stream_settings
from helpers.engine_cases import IMAGE, fastest, random_episodes, slow_forward, small_config

from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.data.tasks.episodes import Episodes, MiniBatches
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.inner_loop import InnerRule
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.optimizers import Sgd
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep


def test_reptile_with_one_step_of_sgd_is_gradient_descent_on_the_support_loss():
    settings = {"inner_steps": 1, "inner_optimizer": "sgd", "inner_lr": 0.3, "train_shots": None}
    step, result = measured("reptile", uneven=False, inner_batch=None, **settings)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.slow.items()}
    episodes, losses = random_episodes(step.config), []
    norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if name.startswith("norm")}
    for x, y in zip(episodes.support_x_TECHW, episodes.support_y_TE, strict=True):
        losses.append(F.cross_entropy(slow_forward(slow, norm, 0, x), y))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(slow.values()))
    for name, grad in zip(slow, grads, strict=True):
        assert close(result.grads[name], 0.3 * grad), name


def test_reptile_equals_a_serial_loop_with_torchs_adam_on_mini_batches():
    """As in the published code, tasks follow each other (a meta-batch of 1) and Adam's moments are kept."""
    config = small_config(algo="reptile", meta_batch_size=1, inner_steps=4, inner_batch=2, train_shots=None)
    net, state = build(config, IMAGE, CPU)
    step = MetaStep(config, net, state)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.slow.items()}
    adam = torch.optim.Adam(slow.values(), lr=config.inner_lr, betas=(0.0, 0.999), eps=1e-8)
    for number in range(3):
        batches_TIB = torch.tensor([[[0, 3], [5, 1], [2, 4], [1, 0]]])
        episodes = random_episodes(config, seed=number)
        episodes = Episodes(*episodes.sets, None, batches_TIB)
        before = {name: tensor.detach().clone() for name, tensor in slow.items()}
        for batch in batches_TIB[0]:
            norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if "norm" in name}
            x, y = episodes.support_x_TECHW[0, batch], episodes.support_y_TE[0, batch]
            adam.zero_grad()
            F.cross_entropy(slow_forward(slow, norm, 0, x), y).backward()
            adam.step()
        result = step.measure(episodes, 0, measure_all=False)
        for name, tensor in slow.items():
            assert close(result.grads[name], before[name] - tensor.detach(), 1e-6), name
        # An outer rate of 0.5 goes half of the way.
        step.optimizer.set_lr(0.5)
        step.move(result)
        with torch.no_grad():
            for name, tensor in slow.items():
                tensor.copy_(before[name] + 0.5 * (tensor - before[name]))
                assert close(step.state.slow[name].detach(), tensor), name


def test_reptile_meta_lr_decreases_linearly_to_zero():
    config = small_config(algo="reptile", epochs=2, steps_per_epoch=5)
    step = MetaStep(config, *build(config, IMAGE, CPU))
    assert isinstance(step.optimizer, Sgd)
    rates = []
    for number in range(config.total_steps):
        step.set_meta_lr(number // 5, number / config.total_steps)
        rates.append(step.optimizer.lr_now())
    assert rates == pytest.approx([1 - number / 10 for number in range(10)])


def test_mini_batches_use_every_example_once_per_shuffle():
    stream = CurveStream(FAMILIES["line"], stream_settings(split="train", seed=3, shots=5, queries=1))
    batched = MiniBatches(stream, steps=5, size=2)
    result = batched.episodes(7, 4).batches_TIB
    assert result.shape == (4, 5, 2)
    for task, order in enumerate(result.flatten(1).tolist()):
        assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)), task
    # Task 9 has the same mini-batches whichever request it is part of.
    assert torch.equal(batched.episodes(9, 1).batches_TIB[0], result[2])
    assert len({tuple(order) for order in result.flatten(1).tolist()}) > 1
    assert not torch.equal(
        MiniBatches(
            CurveStream(FAMILIES["line"], stream_settings(split="val", seed=3, shots=5, queries=1)), 5, 2
        )
        .episodes(7, 4)
        .batches_TIB,
        result,
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_reptile_adapting_the_head_on_features_equals_adapting_it_in_the_network(optimizer):
    config = small_config(algo="reptile", adapts="head", inner_optimizer=optimizer, train_shots=None)
    net, state = build(config, IMAGE, CPU)
    for name, moment in state.moments.items():
        moment.add_(2.0 if name == "steps" else 0.01)
    twice = copy.copy(state)
    twice.running = {name: rows.repeat(2, 1) for name, rows in state.running.items()}
    episodes, rule = random_episodes(config), InnerRule(optimizer=optimizer)
    one, two = (
        adapted(PredictRequest(TaskSets(fastest(net), episodes), which.frozen(), 3, Statistics.OWN), rule)
        for which in (state, twice)
    )
    assert close(one, two)
    assert not close(one[3], one[0], 1e-3)
