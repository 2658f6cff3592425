"""Build the network and the initial state of meta-training from the settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import Adapts
from mamlctl.engine.algorithms.equal_heads import equal_rows
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.evaluation.evaluator import EvaluationPlan
from mamlctl.engine.evaluation.prediction import zero_head
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import HEAD, Net, body_of, objective_of, with_outputs
from mamlctl.engine.nets.batch_norm import Statistics, init_params, init_running
from mamlctl.engine.nets.factory import BUILT_IN, Parts, make_net
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.engine.training.tensor_names import frozen_names
from mamlctl.settings.schema import TrainConfig


def build(
    config: TrainConfig,
    example_shape: Sequence[int],
    device: torch.device,
    *,
    classes: int | None = None,
    targets: int = 1,
    parts: Parts = BUILT_IN,
) -> tuple[Net, MetaState]:
    """Build the network and its initial state, which depend only on the settings and not on the device.

    Args:
        config: the settings.
        example_shape: C, H, W of images, or D of points.
        device: where the state is placed.
        classes: the number of training classes, for algorithms that train one classifier of all of them.
        targets: for regression: the number of values to predict.
        parts: those of the network that the settings name and that are not built in.

    Raises:
        SettingsError: the images are too small for the network, or a pattern of --freeze matches nothing.
    """
    entry = algorithm_of(config)
    regression = not objective_of(example_shape, config.task_type).has_classes
    outputs = targets if regression else config.ways
    if entry.training_head == "classes" and classes is not None and not regression:
        outputs = classes
    shape = tuple(example_shape) * 2 if entry.sees_goal else tuple(example_shape)
    net = make_net(config, shape, outputs, parts)
    dtype = tensor_dtype(config.precision)
    seed = config.seed if config.init_seed is None else config.init_seed
    slow = net.init(torch.Generator().manual_seed(seed), dtype)
    if net.places == 0:
        size = "x".join(map(str, example_shape[1:]))
        raise SettingsError([(f"images of {size} are too small for --net {config.net}", "use --net mlp")])
    if entry.head_of_zeros(config):
        slow |= zero_head(slow, outputs)
    elif entry.head_start == "equal rows":
        slow |= equal_rows(slow)
    slow = {name: weight.to(device) for name, weight in slow.items()}
    if entry.training_head == "none":
        slow = body_of(slow)
    like = torch.empty((), dtype=dtype, device=device)
    steps = config.inner_steps
    norm = init_params(net.norm_layers, steps if config.bnwb else 1, like)
    running = init_running(net.norm_layers, steps if config.bnrs else 1, like)
    if isinstance(net, ModuleNet):
        net.start_of_norms(seed, norm, running)
    if entry.adapts_norm:
        slow, norm = slow | {name: rows_RC[0] for name, rows_RC in norm.items()}, {}
    adapted = adapted_names(slow, config.adapts)
    # One rate per weight (Meta-SGD), per tensor and inner step (LSLR), or per tensor.
    per_weight, rows = entry.inner_rates == "weight", config.inner_steps if config.lslr else 1
    sizes = {name: (1, *slow[name].shape) if per_weight else (rows,) for name in adapted}
    state = MetaState(
        slow=slow,
        norm=norm,
        rates={name: like.new_full(size, config.inner_lr) for name, size in sizes.items()},
        running=running,
        rates_learnt=entry.learns_rates(config),
    )
    if config.inner_optimizer == "adam":
        state.moments = {name: torch.zeros_like(weight) for name, weight in slow.items()}
        state.moments["steps"] = like.new_zeros(())
    state.frozen_names = frozen_names(config, net, state)
    return net, state


def evaluation_net(config: TrainConfig, net: Net) -> Net:
    """Return the network with one output per class of a task; in training it may have all classes."""
    return with_outputs(net, config.ways) if net.objective.has_classes else net


def evaluation_plan(config: TrainConfig, tasks: int) -> EvaluationPlan:
    """Return the evaluation plan of these settings for a number of tasks."""
    predict = algorithm_of(config).predict(config)
    return EvaluationPlan(tasks, config.evaluation_inner_steps, Statistics(config.bn), predict)


def adapted_names(slow: Sequence[str] | dict[str, Tensor], adapts: Adapts) -> list[str]:
    """Return the names of the tensors that the inner loop adapts."""
    return [name for name in slow if adapts == "all" or (name in HEAD) == (adapts == "head")]
