"""Replayed meta-steps on the CPU: the recorder of these tests calls the recorded function again."""

from pathlib import Path

import pytest
import torch
from helpers.engine_cases import IMAGE, random_episodes, small_config

from mamlctl.engine.algorithms.meta_gradient import MetaStepResult
from mamlctl.engine.kernels.convolutions import GROUPED, PRODUCTS, fastest
from mamlctl.engine.training.checkpoints import restore
from mamlctl.engine.training.cuda_graphs import Captured
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

CPU = torch.device("cpu")


class Recorded:
    """Replaces a CUDA graph: recording does not change the state, replaying writes to the same tensors."""

    count = 0

    def __init__(self, work, step):
        Recorded.count += 1
        self.work, self.step = work, step
        before = {name: tensor.clone() for name, tensor in step.state.stored().items()}
        moments = {
            part: {name: tensor.clone() for name, tensor in tensors.items()}
            for part, tensors in step.optimizer.stored().items()
        }
        self.first = self.run()
        for name, tensor in step.state.stored().items():
            tensor.copy_(before[name])
        restore(step.optimizer.stored(), moments, Path())

    def run(self):
        taken = []
        outer = self.step.measure_as

        def noted(*args):
            taken.append(outer(*args))
            return taken[0]

        self.step.measure_as = noted
        try:
            self.work()
        finally:
            self.step.measure_as = outer
        return taken[0] if taken else None

    def replay(self):
        again = self.run()
        if again is not None:
            copy_into(self.first, again)


def copy_into(old: MetaStepResult, new: MetaStepResult):
    for name in ("grads", "query_losses", "query_scores"):
        for key, value in getattr(new, name).items():
            getattr(old, name)[key].copy_(value)
    old.meta_loss.copy_(new.meta_loss)
    old.support_losses_I.copy_(new.support_losses_I)
    for one, other in zip(old.norm_passes, new.norm_passes, strict=True):
        for name, pair in other.seen.items():
            for value, fresh in zip(one.seen[name], pair, strict=True):
                value.copy_(fresh)


def trained(captured, engine="adjoint"):
    config = small_config(algo="maml++", msl_epochs=3, da_epochs=2, epochs=5, engine=engine)
    net, state = build(config, IMAGE, CPU)
    step = MetaStep(config, net, state)
    runner = Captured(step, record=lambda work: Recorded(work, step)) if captured else step
    losses = []
    for number in range(20):
        measured = runner.measure(
            random_episodes(config, seed=number), number // 4, measure_all=number % 3 == 0
        )
        runner.apply(measured, number // 4)
        losses.append({steps: float(loss) for steps, loss in measured.query_losses.items()})
    return state.stored(), losses


@pytest.mark.parametrize("engine", ["adjoint", "plain"])
def test_replayed_meta_steps_follow_tasks_and_schedules(engine):
    """MSL weights, learning rate, derivative order and measurements all change on the way."""
    Recorded.count = 0
    (eager, losses), (replayed, again) = (trained(captured, engine) for captured in (False, True))
    # First order; second order with MSL; second order with the last step only. Each occurs with and without
    # measuring all query losses, except that one of these six kinds occurs only once and is not recorded.
    assert Recorded.count == 2 * (2 * 3 - 1), "two graphs per kind, recorded once"
    assert losses == again
    for name, tensor in eager.items():
        assert torch.equal(tensor, replayed[name]), name


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_failed_capture_is_reported_once_and_training_stays_eager(error):
    config = small_config(algo="maml++")
    net, state = build(config, IMAGE, CPU)
    failures = []

    def broken(work):
        raise error("operation not permitted when stream is capturing\nmore")

    runner = Captured(MetaStep(config, net, state), record=broken, on_failure=failures.append)
    other_net, other = build(config, IMAGE, CPU)
    eager = MetaStep(config, other_net, other)
    for number in range(4):
        for each in (runner, eager):
            each.apply(each.measure(random_episodes(config, seed=number), 0, measure_all=False), 0)
    assert failures == ["operation not permitted when stream is capturing"], "reported once"
    for name, tensor in state.stored().items():
        assert torch.equal(tensor, other.stored()[name]), name


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_by_matrix_products_equal_grouped_convolutions(channels):
    generator = torch.Generator().manual_seed(channels)
    x, weight, g = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((5, 4 * channels, 9, 8), (8, channels, 3, 3), (5, 8, 9, 8))
    )
    assert torch.allclose(GROUPED.forward(x, weight, 4), PRODUCTS.forward(x, weight, 4), atol=1e-12)
    for by_input in (False, True):
        pairs = [way.backward(g, x, weight, 4, by_input) for way in (GROUPED, PRODUCTS)]
        assert torch.allclose(pairs[0][1], pairs[1][1], atol=1e-12)
        assert pairs[0][0] is None if not by_input else torch.allclose(pairs[0][0], pairs[1][0], atol=1e-12)


def test_the_faster_convolution_method_is_chosen():
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3)
    for order in ((3.0, 2.0), (2.0, 3.0)):
        times = iter(order)
        way = fastest((GROUPED, PRODUCTS), x, weight, 2, lambda work, times=times: work() and next(times))
        assert way is (GROUPED if order[0] < order[1] else PRODUCTS)
