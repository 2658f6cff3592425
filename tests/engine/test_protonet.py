"""Prototypical networks and nearest neighbours compared with direct computations."""

import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import CPU, close, measured
from helpers.engine_cases import IMAGE, fastest, random_episodes, slow_forward, small_config

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.pretraining import by_neighbours
from mamlctl.engine.algorithms.protonet import by_prototypes
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.engine.nets.base import CLASSIFICATION
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build


def test_prototypical_networks_equal_a_direct_computation():
    step, result = measured("protonet")
    episodes = random_episodes(step.config)
    ways = step.config.ways
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.slow.items()}
    norm = {name: tensor.detach().clone().requires_grad_() for name, tensor in step.state.norm.items()}
    eye = {"linear.weight": torch.eye(4).double(), "linear.bias": torch.zeros(4).double()}
    losses, right = [], []
    for x, y, qx, qy in zip(*episodes.sets, strict=True):
        support, query = (slow_forward(slow | eye, norm, 0, images) for images in (x, qx))
        centres = torch.stack([support[y == label].mean(0) for label in range(ways)])
        distances = torch.cdist(query, centres).square()
        losses.append(F.cross_entropy(-distances, qy))
        right.append((distances.argmin(1) == qy).double().mean())
    expected = dict(slow | norm)
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(expected.values()))
    for name, grad in zip(expected, grads, strict=True):
        assert close(result.grads[name], grad, 1e-8), name
    assert float(result.query_scores[0]) == pytest.approx(torch.stack(right).mean().item())
    request = PredictRequest(TaskSets(fastest(step.net), episodes), step.state.frozen(), 0, Statistics.OWN)
    outputs = by_prototypes(request)
    assert outputs.shape[:2] == (1, 2)
    assert float(CLASSIFICATION.loss(outputs[0], episodes.query_y_TE).mean()) == pytest.approx(
        torch.stack(losses).mean().item()
    )


def test_nearest_predicts_the_class_of_the_nearest_support_example():
    config = small_config(algo="nearest")
    net, state = build(config, IMAGE, CPU)
    episodes = random_episodes(config)
    outputs = by_neighbours(PredictRequest(TaskSets(fastest(net), episodes), state, 0, Statistics.OWN))
    eye = {"linear.weight": torch.eye(4).double(), "linear.bias": torch.zeros(4).double()}
    for task in range(2):
        support, query = (
            slow_forward(state.slow | eye, state.norm, 0, part[task])
            for part in (episodes.support_x_TECHW, episodes.query_x_TECHW)
        )
        nearest = episodes.support_y_TE[task][torch.cdist(query, support).argmin(1)]
        assert torch.equal(outputs[0, task].argmax(1), nearest)


@pytest.mark.parametrize("predict", [by_prototypes, by_neighbours])
def test_running_statistics_normalise_both_sets_before_distances(predict):
    """A query that is also a support image then has distance 0 to itself."""
    config = small_config(algo="nearest", shots=1, queries=1)
    net, state = build(config, IMAGE, CPU)
    for rows in state.running.values():
        rows.add_(0.3)
    x, y, _, _ = random_episodes(config).sets
    outputs = predict(
        PredictRequest(TaskSets(fastest(net), Episodes(x, y, x, y)), state, 0, Statistics.RUNNING)
    )
    assert float(outputs[0].amax(-1).abs().max()) < 1e-9
