"""MAML in closed form, and every algorithm with different chunks, engines and on curves."""

import itertools

import pytest
import torch
from helpers.algorithm_cases import CPU, close, joined, linear_tasks, quadratic, random_line
from helpers.data_cases import stream_settings
from helpers.engine_cases import IMAGE, random_episodes, small_config

from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_gradient_of_quadratic_tasks_equals_the_closed_form(steps, first_order):
    """For a quadratic loss with Hessian A and minimum c, an inner step is v_{k+1} - c = (1 - r A)(v_k - c).

    So the meta-gradient is the mean over tasks of (1 - r A)^steps times the final query gradient, without
    that factor in first order.
    """
    slow, support, query = random_line()
    net, state, episodes = linear_tasks(*support, slow, queries=query)
    weights = (0.0,) * (steps - 1) + (1.0,)
    result = unrolled(net, state, episodes, MetaStepRequest(steps, weights, first_order, measure_all=False))
    expected = 0
    for x, y, qx, qy in zip(*support, *query, strict=True):
        hessian, gradient = quadratic(x, y)
        v = joined(slow).detach()
        for _ in range(steps):
            v = v - 0.1 * gradient(v)
        factor = torch.linalg.matrix_power(torch.eye(len(v)).double() - 0.1 * hessian, steps)
        last = quadratic(qx, qy)[1](v)
        expected = expected + (last if first_order else factor @ last) / len(support[0])
    assert close(joined(result.grads), expected, 1e-13)


def test_fomaml_differs_from_maml_only_by_the_curvature():
    """With one weight, one step of rate r and curvature a, MAML's gradient is (1 - r a) times FOMAML's."""
    slow = {"linear.weight": torch.zeros(1, 1).double(), "linear.bias": torch.zeros(1).double()}
    x = torch.tensor([[[2.0]]]).double()  # loss (2 w - y)^2 in w: a = 8
    grads = {}
    for first_order in (False, True):
        net, state, episodes = linear_tasks(x, torch.tensor([[3.0]]).double(), slow)
        state.rates = {"linear.weight": torch.full((1,), 0.05, dtype=torch.float64)}
        named = {"inner_steps": 1, "msl_weights": (1.0,), "first_order": first_order, "measure_all": False}
        grads[first_order] = (
            unrolled(net, state, episodes, MetaStepRequest(**named)).grads["linear.weight"].item()
        )
    assert grads[True] == pytest.approx(-12 * (1 - 0.05 * 8))  # the gradient at the adapted weight
    assert grads[False] / grads[True] == pytest.approx(1 - 0.05 * 8)


@pytest.mark.parametrize("algo", sorted(name for name in ALGORITHMS if not ALGORITHMS[name].needs_rewards))
def test_every_algorithm_is_independent_of_task_chunk_and_engine(algo):
    """One or two tasks per pass, hand-written derivatives or autograd."""
    classes = torch.tensor([[4, 0, 3], [2, 1, 0]])
    result = {}
    for engine, chunk in itertools.product(("adjoint", "plain"), ("auto", "1")):
        if ALGORITHMS[algo].whole_batches and chunk == "1":
            continue
        config = small_config(algo=algo, engine=engine, task_chunk=chunk, train_shots=None)
        episodes = Episodes(*random_episodes(config).sets, classes)
        net, state = build(config, IMAGE, CPU, classes=5)
        result[engine, chunk] = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    first = result["adjoint", "auto"]
    for other in result.values():
        assert first.grads.keys() == other.grads.keys()
        for name, grad in first.grads.items():
            assert close(other.grads[name], grad, 1e-7), (algo, name)
        assert first.query_losses.keys() == other.query_losses.keys()
        for steps, loss in first.query_losses.items():
            assert close(other.query_losses[steps], loss, 1e-9), (algo, steps)
        for name, moment in first.moments.items():
            assert close(other.moments[name], moment, 1e-9), (algo, name)


@pytest.mark.parametrize(
    "algo", ["maml", "fomaml", "anil", "boil", "meta-sgd", "alpha-maml", "imaml", "reptile", "transfer"]
)
def test_engines_agree_on_curves(algo):
    """Regression has the same meta-gradient by the adjoint and by double backward."""
    grads = {}
    for engine in ("adjoint", "plain", ALGORITHMS[algo].on_curves.get("engine", "adjoint")):
        config = small_config(algo=algo, engine=engine, net="mlp", ways=1, train_shots=None, inner_lr=0.01)
        net, state = build(config, (1,), CPU)
        settings = stream_settings(split="train", shots=5, queries=4, dtype=torch.float64)
        stream = CurveStream(FAMILIES["sinusoid"], settings)
        result = MetaStep(config, net, state).measure(stream.episodes(0, 3), 0, measure_all=True)
        assert all(result.query_scores[step] == result.query_losses[step] for step in result.query_losses)
        grads[engine] = result.grads
    for name, grad in grads["plain"].items():
        assert all(close(other[name], grad, 1e-9) for other in grads.values()), name
    assert any(float(grad.abs().max()) > 0 for grad in grads["plain"].values())
