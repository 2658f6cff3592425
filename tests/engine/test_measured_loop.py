"""The inner loop with first derivatives only, compared with the plain one."""

from dataclasses import replace

import pytest
import torch
from helpers.derivative_cases import WAYS, needs_c
from helpers.engine_cases import build_uneven, random_episodes, small_config

from mamlctl.engine.evaluation.measured_loop import InnerLoop, TaskSets
from mamlctl.engine.inner_loop import adapt, query_logits

CASES = [pytest.param(way, marks=needs_c if way in ("c", "winograd") else ()) for way in WAYS]


@pytest.mark.parametrize("way", CASES)
def test_weights_and_measurements_equal_the_plain_loop(way):
    config = small_config(algo="maml++")
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    loop = InnerLoop(TaskSets(WAYS[way](net), episodes), state.frozen())
    loop.run(config.inner_steps, measure_all=True)
    loop.record_query_loss(config.inner_steps)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    points = list(adapt(net, state, *support, steps=config.inner_steps, first_order=True))
    for name, weight in points[-1].fast.items():
        assert torch.allclose(loop.fast[name], weight, rtol=1e-11, atol=1e-12), name
    for point, loss_T in zip(points[1:], loop.measurements.support_losses_T, strict=True):
        assert torch.allclose(loss_T, point.support_loss_T, rtol=1e-11)
    assert list(loop.measurements.query_losses_T) == [0, 1, 2, 3]
    for point in points:
        logits_TEN, _ = query_logits(net, state, point, episodes.query_x_TECHW)
        loss_T = net.objective.loss(logits_TEN, episodes.query_y_TE)
        assert torch.allclose(loop.measurements.query_losses_T[point.steps], loss_T, rtol=1e-11)


@pytest.mark.parametrize("way", CASES)
def test_a_mini_batch_equals_a_support_set_of_its_examples(way):
    """Inner step k of a task uses the examples in row k of the task's batches."""
    config = small_config(inner_steps=1, shots=3)
    net, state = build_uneven(config)
    episodes = random_episodes(config)
    batches_TIB = torch.tensor([[[0, 3, 6]], [[8, 1, 4]]])
    whole = InnerLoop(TaskSets(WAYS[way](net), replace(episodes, batches_TIB=batches_TIB)), state.frozen())
    whole.run(1)
    for task, batch_B in enumerate(batches_TIB[:, 0]):
        alone = replace(
            episodes.split(1)[task],
            support_x_TECHW=episodes.support_x_TECHW[task, batch_B].unsqueeze(0),
            support_y_TE=episodes.support_y_TE[task, batch_B].unsqueeze(0),
        )
        part = InnerLoop(TaskSets(WAYS[way](net), alone), state.frozen())
        part.run(1)
        for name, weight in part.fast.items():
            assert torch.allclose(whole.fast[name][task], weight[0], rtol=1e-11, atol=1e-12), name
