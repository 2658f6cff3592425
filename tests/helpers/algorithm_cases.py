"""Tasks whose meta-gradient has a closed form, and a meta-step of any algorithm."""

import torch

from helpers.engine_cases import IMAGE, build_uneven, random_episodes, small_config
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import REGRESSION, HeadNet
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

CPU = torch.device("cpu")


def close(one, two, tolerance=1e-9):
    scale = float(two.abs().max())
    return one.shape == two.shape and float((one - two).abs().max()) <= tolerance * scale + 1e-14


def measured(algo, episodes=None, *, epoch=0, uneven=True, **settings):
    config = small_config(algo=algo, **settings)
    net, state = (build_uneven if uneven else lambda config: build(config, IMAGE, CPU))(config)
    step = MetaStep(config, net, state)
    episodes = random_episodes(config) if episodes is None else episodes
    return step, step.measure(episodes, epoch, measure_all=True)


def central_difference(measure, tensor, direction, length):
    """The slope of `measure()` when `tensor` moves along `direction`, from -`length` to `length`."""
    values = []
    for signed in (length, -length):
        tensor.detach().add_(signed * direction)  # changes `tensor`, with which it shares memory
        values.append(float(measure()))
        tensor.detach().sub_(signed * direction)
    return (values[0] - values[1]) / (2 * length)


def unit_vector(tensor, at):
    """A direction in which only the element `at` of a tensor changes."""
    direction = torch.zeros_like(tensor)
    direction[at] = 1
    return direction


def linear_tasks(x, y, slow, *, inner_lr=0.1, queries=None):
    """Linear regression with a quadratic loss, mean (w . x + b - y)^2; points x_TED, values y_TE."""
    net = HeadNet(1, REGRESSION)
    state = MetaState(slow, {}, {name: torch.full((1,), inner_lr, dtype=torch.float64) for name in slow})
    for tensor in slow.values():
        tensor.requires_grad_()
    return net, state, Episodes(x, y, *(queries or (x, y)))


def random_line(seed=0, tasks=3, examples=4, features=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    slow = {"linear.weight": normal(1, features), "linear.bias": normal(1)}
    support, query = ((normal(tasks, examples, features), normal(tasks, examples)) for _ in range(2))
    return slow, support, query


def quadratic(x_ED, y_E):
    """The Hessian of mean (w . x + b - y)^2 in v = (w, b), and its gradient as a function of v."""
    inputs = torch.cat([x_ED, torch.ones(len(x_ED), 1).double()], 1)
    hessian = 2 * inputs.T @ inputs / len(y_E)
    return hessian, lambda v: 2 * inputs.T @ (inputs @ v - y_E) / len(y_E)


def joined(weights):
    return torch.cat([weights["linear.weight"].flatten(), weights["linear.bias"].flatten()])
