"""Regression with several inputs and targets: closed forms on rows of a table, and C."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.algorithm_cases import CPU
from helpers.data_cases import stream_settings
from helpers.derivative_cases import assert_equal_measurements, needs_c
from helpers.engine_cases import small_config
from helpers.own_tables import csv_text, linear_tasks

from mamlctl.data.reading.tables import read_table
from mamlctl.data.tasks.table_tasks import TableStream, standardisation_of
from mamlctl.engine.algorithms.compiled_mlp import compiled
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.algorithms.pretraining import pretraining
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, evaluate
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import REGRESSION, HeadNet, squared_error
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build

RATE, INPUTS, TARGETS = 0.07, 3, 2


@pytest.fixture
def stream(tmp_path):
    rows, heads = linear_tasks(6, 11, INPUTS, TARGETS)
    (tmp_path / "t.csv").write_text(csv_text(rows, heads))
    table = read_table(tmp_path / "t.csv", "x*", "y*")
    values = standardisation_of(table, table.tasks)
    settings = stream_settings(split="val", seed=1, shots=4, queries=5, dtype=torch.float64)
    return TableStream(table, table.tasks, values, settings)


def linear_learner(requires_grad=True):
    generator = torch.Generator().manual_seed(2)
    weights = {
        "linear.weight": torch.randn(TARGETS, INPUTS, generator=generator, dtype=torch.float64),
        "linear.bias": torch.randn(TARGETS, generator=generator, dtype=torch.float64),
    }
    for weight in weights.values():
        weight.requires_grad_(requires_grad)
    rates = {name: torch.tensor([RATE], dtype=torch.float64) for name in weights}
    return HeadNet(TARGETS, REGRESSION), MetaState(weights, {}, rates)


def by_hand(stream, state, first_order, draw):
    """The weights after one inner step, the query loss, and the meta-gradient of one task, all in numpy.

    With rows (x, 1) in X and w of shape (D + 1, N), the loss is |X w - Y|^2 / (E N), its gradient
    2 X^T (X w - Y) / (E N), and its Hessian 2 X^T X / (E N) for every target.
    """
    rows = stream.standardisation.apply(stream.table.values_MC)[stream.rows_of(draw, 1)[0]]
    x = np.concatenate([rows[:, :INPUTS], np.ones((len(rows), 1))], axis=1)
    y, cut = rows[:, INPUTS:], stream.shots
    sets = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    weight, bias = (state.slow[name].detach().numpy() for name in ("linear.weight", "linear.bias"))
    w = np.concatenate([weight.T, bias[None]])
    gradients = [lambda w, x=x, y=y: 2 * x.T @ (x @ w - y) / y.size for x, y in sets]
    moved = w - RATE * gradients[0](w)
    gradient = gradients[1](moved)
    if not first_order:
        x, y = sets[0]
        gradient = gradient - RATE * (2 * x.T @ x / y.size) @ gradient
    x, y = sets[1]
    return moved, np.square(x @ moved - y).mean(), gradient, x @ moved


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient_of_a_linear_model_has_its_closed_form(stream, first_order):
    net, state = linear_learner()
    request = MetaStepRequest(1, (1.0,), first_order, measure_all=False)
    result = unrolled(net, state, stream.episodes(7, 5), request)
    tasks = [by_hand(stream, state, first_order, draw) for draw in range(7, 12)]
    expected = np.mean([gradient for _, _, gradient, _ in tasks], axis=0)
    assert np.allclose(
        result.grads["linear.weight"].detach().numpy(), expected[:-1].T, rtol=1e-12, atol=1e-14
    )
    assert np.allclose(result.grads["linear.bias"].detach().numpy(), expected[-1], rtol=1e-12, atol=1e-14)
    assert float(result.meta_loss) == pytest.approx(np.mean([loss for _, loss, _, _ in tasks]), rel=1e-13)


def test_predictions_and_scores_after_one_inner_step_are_those_by_hand(stream):
    net, state = linear_learner(requires_grad=False)
    episodes = stream.episodes(3, 1)
    request = PredictRequest(TaskSets(Autograd(net), episodes), state, 1, Statistics.OWN)
    _, loss, _, predicted = by_hand(stream, state, False, 3)
    assert np.allclose(adapted(request)[1, 0].numpy(), predicted, rtol=1e-12)
    # Scores are means over the draws of each task; errors of targets have the units of the table.
    scores = evaluate(Autograd(net), [state], stream, EvaluationPlan(14, 1, Statistics.OWN)).single[0]
    expected, errors = {}, {}
    for draw, task in enumerate(stream.tasks_of(0, 14).tolist()):
        _, loss, _, predicted = by_hand(stream, state, False, draw)
        rows = stream.table.values_MC[stream.rows_of(draw, 1)[0]][stream.shots :, INPUTS:]
        expected.setdefault(task, []).append(loss)
        errors.setdefault(task, []).append(
            np.square(stream.standardisation.targets_of(predicted) - rows).mean(0)
        )
    assert sorted(map(len, expected.values())) == [2, 2, 2, 2, 3, 3]
    assert np.allclose(scores.last_T, [np.mean(expected[task]) for task in range(6)], rtol=1e-12)
    assert np.allclose(scores.targets_TN, [np.mean(errors[task], axis=0) for task in range(6)], rtol=1e-12)


def test_the_score_of_a_single_target_has_the_unit_of_the_table(tmp_path):
    rows, heads = linear_tasks(3, 8, 1, 1)
    (tmp_path / "t.csv").write_text(csv_text(rows, heads))
    table = read_table(tmp_path / "t.csv", "x*", "y*")
    settings = stream_settings(split="test", shots=3, queries=4, dtype=torch.float64)
    stream = TableStream(table, table.tasks, standardisation_of(table, table.tasks), settings)
    state = MetaState(
        {
            "linear.weight": torch.zeros(1, 1, dtype=torch.float64),
            "linear.bias": torch.zeros(1, dtype=torch.float64),
        },
        {},
        {},
    )
    scores = evaluate(
        Autograd(HeadNet(1, REGRESSION)), [state], stream, EvaluationPlan(6, 0, Statistics.OWN)
    ).single[0]
    mean = stream.standardisation.mean[1]  # what outputs of 0 predict
    for task, score in enumerate(scores.last_T):
        draws = np.flatnonzero(stream.tasks_of(0, 6) == task)
        values = [table.values_MC[stream.rows_of(int(draw), 1)[0]][3:, 1] for draw in draws]
        assert score == pytest.approx(np.square(np.array(values) - mean).mean(), rel=1e-12)
    assert np.allclose(scores.last_T, scores.targets_TN[:, 0])


def test_squared_errors_are_means_over_examples_and_targets():
    generator = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(2, 3, 5, 2, generator=generator, dtype=torch.float64)
    expected = [
        sum(float((outputs[t, e, n] - y[t, e, n]) ** 2) for e in range(5) for n in range(2)) / 10
        for t in range(3)
    ]
    assert squared_error(outputs, y).tolist() == pytest.approx(expected)
    one = squared_error(outputs[..., :1], y[..., 0])
    assert torch.equal(one, squared_error(outputs[..., :1], y[..., :1]))


def test_pre_training_is_the_gradient_of_the_pooled_rows(stream):
    net, state = linear_learner()
    episodes = stream.episodes(0, 4)
    result = pretraining(net, state, episodes, MetaStepRequest(0, (), False, False), engine="plain")
    x = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1)
    y = torch.cat([episodes.support_y_TE, episodes.query_y_TE], 1).flatten(0, 1)
    (x @ state.slow["linear.weight"].T + state.slow["linear.bias"] - y).square().mean().backward()
    for name, weight in state.slow.items():
        assert torch.allclose(result.grads[name], weight.grad, rtol=1e-12)


@needs_c
@pytest.mark.parametrize(
    "learnt", [{}, {"lslr": True}, {"algo": "meta-sgd"}], ids=["maml", "lslr", "meta-sgd"]
)
def test_meta_gradients_in_c_equal_double_backward(stream, learnt):
    settings = {"net": "mlp", "ways": 1, "hidden": "17-6", "inner_steps": 3, "engine": "compiled"}
    config = small_config(**settings | learnt)
    net, state = build(config, (INPUTS,), CPU, targets=TARGETS)
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    episodes = stream.episodes(2, 7)
    for first_order, weights in itertools.product((False, True), ((0.2, 0.3, 0.5), (0.0, 0.0, 1.0))):
        request = MetaStepRequest(3, weights, first_order, measure_all=True)
        result, expected = (part(net, state, episodes, request) for part in (compiled, unrolled))
        assert_equal_measurements(result, expected, state)
    single = replace(request, first_order=False)
    one_target, one_state = build(config, (INPUTS,), CPU, targets=1)
    for tensor in one_state.learnable().values():
        tensor.requires_grad_()
    first = replace(
        episodes,
        support_y_TE=episodes.support_y_TE[..., :1].contiguous(),
        query_y_TE=episodes.query_y_TE[..., :1].contiguous(),
    )
    result, expected = (part(one_target, one_state, first, single) for part in (compiled, unrolled))
    assert_equal_measurements(result, expected, one_state)
