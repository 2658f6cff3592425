"""The baselines without meta-learning: pre-training on all training classes, and a random initialisation.

Pre-training minimises the cross-entropy over all classes of the training split, mean over examples of
-log p(class | x); for regression it minimises the squared error. All examples of a meta-batch form one batch.

On a test task `transfer` fine-tunes the pre-trained weights with a new head of zeros (Chen et al. 2019,
arXiv:1904.04232, section 3), and `nearest` predicts the class of the support example with the nearest
features (a baseline of Vinyals et al. 2016, arXiv:1606.04080). `scratch` fine-tunes a random initialisation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.prediction import (
    PredictRequest,
    adapted,
    comparable_features,
    nearest_distances,
    zero_head,
)
from mamlctl.engine.inner_loop import Measurements, MetaState, expanded
from mamlctl.engine.nets.base import Net


@torch.no_grad()
def pretraining(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest, *, engine: EngineName
) -> MetaStepResult:
    """Compute the gradient of the loss on all M examples of both sets of all tasks.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`; `request` is not used.
        engine: the --engine setting.

    Returns:
        As in `meta_gradient.Outer`; the loss is recorded as the query loss after 0 inner steps.
    """
    # The derivatives need a task axis: all examples are one set of one task.
    x_1MCHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1).unsqueeze(0)
    y_TE = torch.cat([episodes.support_y_TE, episodes.query_y_TE], 1)
    if episodes.class_TN is not None:
        # Labels are positions of classes in their task; replace them with classes of the split.
        y_TE = episodes.class_TN.gather(1, y_TE)
    y_1M = y_TE.flatten(0, 1).unsqueeze(0)  # _1MN for several targets
    keys_T = episodes.support_keys_T
    norm = state.norm_pass(0, keys_T=None if keys_T is None else keys_T[:1])
    prepared = select_derivatives(net, x_1MCHW, engine).prepare(x_1MCHW, y_1M)
    gradient = prepared.gradient(expanded(state.slow, 1), norm)
    grads = {name: grad[0] for name, grad in gradient.fast.items()}
    grads |= {name: grad.unsqueeze(0) for name, grad in gradient.norm.items()}
    measurements = Measurements(net.objective, norm_passes=[norm])
    loss = measurements.add_query(0, gradient.logits_TEN, y_1M, gradient.loss_T).mean()
    return MetaStepResult.of(measurements, grads, loss)


@torch.no_grad()
def no_training(net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
    """Measure the query loss of the initialisation, and return gradients of 0; arguments as in `Outer`."""
    norm = state.norm_pass(0)
    outputs_TEN = net(expanded(state.slow, len(episodes.query_y_TE)), episodes.query_x_TECHW, norm)
    measurements = Measurements(net.objective, norm_passes=[norm])
    loss = measurements.add_query(0, outputs_TEN, episodes.query_y_TE).mean()
    grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
    return MetaStepResult.of(measurements, grads, loss)


def fine_tuned(request: PredictRequest) -> Tensor:
    """Predict as `adapted`, for classes from a new head of zeros: the pre-trained head has other classes."""
    net, slow = request.derivatives.net, request.state.slow
    if net.objective.has_classes:
        slow = slow | zero_head(slow, net.outputs)
    return adapted(replace(request, state=replace(request.state, slow=slow)))


def by_neighbours(request: PredictRequest) -> Tensor:
    """Predict the class of the support example at the smallest Euclidean distance -> outputs_1TEN."""
    support_TEF, query_TEF = comparable_features(request)
    y_TE, ways = request.episodes.support_y_TE, request.derivatives.net.outputs
    return -nearest_distances(query_TEF, support_TEF, y_TE, ways).unsqueeze(0)
