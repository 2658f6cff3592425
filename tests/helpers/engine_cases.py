"""Small learners in float64, and an independent, slow MAML++ to compare the engine with."""

import torch
import torch.nn.functional as F

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.training.initial_state import build
from mamlctl.settings.merge import fill_schedules
from mamlctl.settings.schema import TrainConfig

IMAGE = (1, 16, 16)  # the smallest image with a pixel left after four halvings
SMALL = {
    "ways": 3,
    "shots": 2,
    "queries": 2,
    "inner_steps": 3,
    "filters": 4,
    "meta_batch_size": 2,
    "epochs": 10,
}


def small_config(**settings):
    """The settings of a small float64 learner; `settings` as in TrainConfig."""
    values = SMALL | {"precision": "float64", "inner_lr": 0.05, "rotations": "none"} | settings
    values = {"algo": "maml"} | values
    entry = ALGORITHMS[values["algo"]]
    values = dict(entry.defaults) | values | dict(entry.forced)
    return fill_schedules(TrainConfig(**values), {"split_scheme": "own", "resize": "none"})


def fastest(net):
    """The derivatives that a float64 run on the CPU uses."""
    return select_derivatives(net, torch.empty(0, dtype=torch.float64))


def random_episodes(config, seed=0, image=IMAGE):
    """Tasks of random images: each class is a pattern, each example is the pattern with noise."""
    generator = torch.Generator().manual_seed(seed)
    tasks, ways, examples = config.meta_batch_size, config.ways, config.shots + config.queries
    pattern = torch.randn(tasks, ways, 1, *image, generator=generator, dtype=torch.float64)
    noise = torch.randn(tasks, ways, examples, *image, generator=generator, dtype=torch.float64)
    x = pattern + 0.5 * noise
    labels = torch.arange(ways)[:, None].expand(tasks, ways, examples)

    def part(tensor, where):
        return tensor[:, :, where].flatten(1, 2)

    support, query = slice(0, config.shots), slice(config.shots, None)
    return Episodes(part(x, support), part(labels, support), part(x, query), part(labels, query))


def build_uneven(config, seed=1, image=IMAGE):
    """A state whose norm rows and rates all differ, so that using a wrong row changes the result."""
    net, state = build(config, image, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for part in (state.norm, state.rates):
        for tensor in part.values():
            tensor.add_(
                0.2 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            )
    for name, tensor in state.norm.items():
        if name.endswith("bias"):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return net, state


def slow_forward(fast, norm, step, x):
    """Conv4 for one task, with torch's batch norm."""
    for block in range(1, 5):
        gamma, beta = (norm[f"norm{block}.{kind}"] for kind in ("weight", "bias"))
        row = min(step, len(gamma) - 1)
        x = F.conv2d(x, fast[f"conv{block}.weight"], padding=1)
        x = F.batch_norm(x, None, None, gamma[row], beta[row], training=True)
        x = F.max_pool2d(F.leaky_relu(x, 0.01), 2)
    return F.linear(x.flatten(1), fast["linear.weight"], fast["linear.bias"])


def slow_meta_loss(state, episodes, *, inner_steps, msl_weights, first_order):
    """The differentiable meta-loss, computed for one task and one example set at a time."""
    losses = []
    for task in range(len(episodes.support_y_TE)):
        fast = dict(state.slow)
        task_loss = 0
        for step in range(inner_steps):
            logits = slow_forward(fast, state.norm, step, episodes.support_x_TECHW[task])
            loss = F.cross_entropy(logits, episodes.support_y_TE[task])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            updated = {}
            for (name, weight), grad in zip(fast.items(), grads, strict=True):
                rate = state.rates[name]
                updated[name] = weight - rate[min(step, len(rate) - 1)] * grad
            fast = updated
            if msl_weights[step]:
                logits = slow_forward(fast, state.norm, step, episodes.query_x_TECHW[task])
                task_loss = task_loss + msl_weights[step] * F.cross_entropy(logits, episodes.query_y_TE[task])
        losses.append(task_loss)
    return torch.stack(losses).mean()
