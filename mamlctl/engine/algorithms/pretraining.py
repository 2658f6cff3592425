"""Supervised pre-training on all classes, and no training at all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, _without_steps
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.prediction import adapted, comparable_features, expanded, nearest_distances
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import CLASSIFICATION, HEAD, Net
from mamlctl.engine.nets.batch_norm import NormPass, Statistics


@torch.no_grad()
def pretraining(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
    *,
    engine: str,
) -> MetaStepResult:
    """Pre-training: one network on all classes (or curves) at once, each meta-batch one batch of examples."""
    x_1MCHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1).unsqueeze(0)
    y_TE = torch.cat([episodes.support_y_TE, episodes.query_y_TE], 1)
    if episodes.class_TN is not None:
        y_TE = episodes.class_TN.gather(1, y_TE)
    y_1M = y_TE.reshape(1, -1)
    derivatives = select_derivatives(net, x_1MCHW, engine)
    norm = NormPass(state.norm, state.running, 0)
    found = derivatives.gradient(expanded(state.slow, 1), derivatives.prepare(x_1MCHW, y_1M), norm)
    score = net.objective.score(found.logits_TEN, y_1M).mean()
    grads = {name: grad[0] for name, grad in found.fast.items()}
    grads |= {name: grad.unsqueeze(0) for name, grad in found.norm.items()}
    return _without_steps(grads, found.loss_T.mean(), score, [norm])


@torch.no_grad()
def no_training(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
) -> MetaStepResult:
    """Nothing is learnt: the loss of the random start, and gradients of 0."""
    norm = NormPass(state.norm, state.running, 0)
    tasks = len(episodes.query_y_TE)
    outputs_TEN = net(expanded(state.slow, tasks), episodes.query_x_TECHW, norm)
    loss = net.objective.loss(outputs_TEN, episodes.query_y_TE).mean()
    score = net.objective.score(outputs_TEN, episodes.query_y_TE).mean()
    grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
    return _without_steps(grads, loss, score, [norm])


def fine_tuned(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
) -> Tensor:
    """As `adapted`, with a new head of zeros where there are classes: pre-training knew others."""
    net, slow = derivatives.net, state.slow
    if net.objective is CLASSIFICATION:
        weight = slow["linear.weight"]
        zeros = weight.new_zeros(net.outputs, weight.shape[1]), weight.new_zeros(net.outputs)
        slow = slow | dict(zip(HEAD, zeros, strict=True))
    return adapted(
        derivatives, replace(state, slow=slow), episodes, inner_steps=inner_steps, statistics=statistics
    )


def by_neighbours(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
) -> Tensor:
    """The class of the nearest support example, Euclidean in the features."""
    support_TEF, query_TEF = comparable_features(derivatives, state, episodes, statistics)
    distances_TEN = nearest_distances(query_TEF, support_TEF, episodes.support_y_TE, derivatives.net.outputs)
    return -distances_TEN.unsqueeze(0)
