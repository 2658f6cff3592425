"""Pre-training, fine-tuning and a random initialisation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.algorithm_cases import CPU, close, measured
from helpers.engine_cases import IMAGE, build_uneven, fastest, random_episodes, slow_forward, small_config

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.pretraining import fine_tuned
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep


def test_pre_training_trains_one_classifier_of_all_classes():
    config = small_config(algo="transfer")
    net, state = build(config, IMAGE, CPU, classes=9)
    assert net.outputs == 9
    step = MetaStep(config, net, state)
    episodes = random_episodes(config)
    class_TN = torch.tensor([[8, 0, 3], [2, 8, 1]])
    episodes = Episodes(*episodes.sets, class_TN)
    result = step.measure(episodes, 0, measure_all=False)
    slow = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.slow.items()}
    norm = {name: tensor.unsqueeze(0) for name, tensor in slow.items() if name.startswith("norm")}
    x = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1)
    y = torch.cat([class_TN.repeat_interleave(2, 1)] * 2, 1).flatten()
    loss = F.cross_entropy(slow_forward(slow, norm, 0, x), y)
    grads = torch.autograd.grad(loss, list(slow.values()))
    assert float(result.meta_loss) == pytest.approx(loss.item())
    for name, grad in zip(slow, grads, strict=True):
        assert close(result.grads[name], grad), name


@pytest.mark.parametrize("adapts", ["all", "head"])
def test_fine_tuning_starts_with_a_head_of_zeros_and_descends_on_the_support_loss(adapts):
    config = small_config(algo="transfer", adapts=adapts, inner_lr=0.3)
    net, _ = build(config, IMAGE, CPU)
    _, state = build(config, IMAGE, CPU, classes=9)
    episodes = random_episodes(config)
    outputs = fine_tuned(PredictRequest(TaskSets(fastest(net), episodes), state, 3, Statistics.OWN))
    assert (outputs[0] == 0).all()
    for task in range(2):
        fast = {name: tensor.clone() for name, tensor in state.slow.items()}
        fast |= {"linear.weight": torch.zeros(3, 4).double(), "linear.bias": torch.zeros(3).double()}
        for _ in range(3):
            leaves = {name: tensor.requires_grad_() for name, tensor in fast.items()}
            norm = {name: tensor.unsqueeze(0) for name, tensor in leaves.items() if "norm" in name}
            logits = slow_forward(leaves, norm, 0, episodes.support_x_TECHW[task])
            loss = F.cross_entropy(logits, episodes.support_y_TE[task])
            grads = torch.autograd.grad(loss, list(leaves.values()))
            fast = {
                name: (tensor - 0.3 * grad if adapts == "all" or name in HEAD else tensor).detach()
                for (name, tensor), grad in zip(leaves.items(), grads, strict=True)
            }
        norm = {name: tensor.unsqueeze(0) for name, tensor in fast.items() if "norm" in name}
        expected = slow_forward(fast, norm, 0, episodes.query_x_TECHW[task])
        assert close(outputs[3, task], expected, 1e-8)


@pytest.mark.parametrize("statistics", list(Statistics))
def test_adapting_the_head_on_features_equals_adapting_it_in_the_network(statistics):
    """`adapted` passes through the body only once, unless batch norm has more than one row."""
    config = small_config(algo="anil")
    net, state = build_uneven(config)
    for rows in state.running.values():
        rows.add_(0.3)
    twice = copy.copy(state)
    twice.norm = {name: rows.repeat(2, 1) for name, rows in state.norm.items()}
    episodes = random_episodes(config)
    one, two = (
        adapted(PredictRequest(TaskSets(fastest(net), episodes), which.frozen(), 4, statistics))
        for which in (state, twice)
    )
    assert close(one, two)


def test_scratch_learns_nothing():
    step, result = measured("scratch")
    before = {name: tensor.detach().clone() for name, tensor in step.learnable.items()}
    step.apply(result, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.learnable.items())
    assert all((grad == 0).all() for grad in result.grads.values())
