"""Predict the query set of a task with a trained state.

A predictor returns outputs_ITEN, class scores or values after 0, 1, ..., I inner steps: I + 1 entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.interface import Derivatives, PreparedSet
from mamlctl.engine.evaluation.measured_loop import InnerLoop
from mamlctl.engine.inner_loop import DESCENT, InnerRule, MetaState, expanded
from mamlctl.engine.nets.base import HEAD, HeadNet, body_of
from mamlctl.engine.nets.batch_norm import Params, Statistics


@dataclass(frozen=True)
class PredictRequest:
    """The tasks to predict, and the state that adapts to them."""

    derivatives: Derivatives
    state: MetaState  # frozen
    episodes: Episodes
    inner_steps: int  # I
    statistics: Statistics  # of the query set; the inner loop normalises the support set by its own


Predict = Callable[[PredictRequest], Tensor]  # adapt the state as its algorithm does -> outputs_ITEN


def prototypes(f_TEF: Tensor, y_TE: Tensor, ways: int) -> Tensor:
    """Compute the prototype of each class, the mean of its features (arXiv:1703.05175, equation 1).

    Args:
        f_TEF: features of the support set.
        y_TE: its labels; classes may have different numbers of examples.
        ways: the number of classes N.

    Returns:
        The prototypes, _TNF.
    """
    is_of_TNE = (torch.arange(ways, device=y_TE.device).unsqueeze(1) == y_TE.unsqueeze(1)).to(f_TEF.dtype)
    return (is_of_TNE / is_of_TNE.sum(-1, keepdim=True)) @ f_TEF


def class_distances(f_TEF: Tensor, prototypes_TNF: Tensor) -> Tensor:
    """Compute the squared Euclidean distance of every example to every prototype -> _TEN."""
    # |f - c|^2 = |f|^2 - 2 <f, c> + |c|^2. The tensor of differences would have E x N x F elements: 20 times
    # the work at 20 ways.
    products_TEN = f_TEF @ prototypes_TNF.transpose(1, 2)
    return (
        f_TEF.square().sum(-1, keepdim=True) - 2 * products_TEN + prototypes_TNF.square().sum(-1).unsqueeze(1)
    )


def nearest_distances(f_TEF: Tensor, support_TMF: Tensor, y_TM: Tensor, ways: int) -> Tensor:
    """Compute the squared Euclidean distance of every example to the nearest one of each class.

    Args:
        f_TEF: features of the examples.
        support_TMF: features of the M support examples.
        y_TM: their labels.
        ways: the number of classes N.

    Returns:
        The distances, _TEN; infinity for a class without support examples.
    """
    distances_TEM = class_distances(f_TEF, support_TMF)
    tasks, examples, _ = distances_TEM.shape
    farthest_TEN = distances_TEM.new_full((tasks, examples, ways), torch.inf)
    return farthest_TEN.scatter_reduce(2, y_TM.unsqueeze(1).expand_as(distances_TEM), distances_TEM, "amin")


def zero_head(weights: Mapping[str, Tensor], ways: int) -> Params:
    """Return a head of zeros for `ways` classes, with the dtype and device of the head in `weights`."""
    weight, bias = (weights[name] for name in HEAD)
    zeros = weight.new_zeros(ways, weight.shape[1]), bias.new_zeros(ways)
    return dict(zip(HEAD, zeros, strict=True))


def adapted(request: PredictRequest, rule: InnerRule = DESCENT) -> Tensor:
    """Predict after each of 0, 1, ..., I inner steps from the state's weights -> outputs_ITEN.

    With Statistics.SUPPORT the support set passes through the network with the queries, so that the
    statistics of every layer come from the same weights.
    """
    state = request.state
    # If only the head is adapted and all steps share their norm rows, the features are the same at every
    # step: pass through the body once, and run the loop on the features.
    one_row = all(len(rows) == 1 for rows in (state.norm | state.running).values())
    if one_row and state.rates.keys() <= set(HEAD):
        support_TEF, query_TEF = features_of_sets(request)
        net, state = request.derivatives.net, state.head_alone()
        request = replace(
            request,
            derivatives=Autograd(HeadNet(net.outputs, net.objective)),
            state=state,
            episodes=replace(request.episodes, support_x_TECHW=support_TEF, query_x_TECHW=query_TEF),
            statistics=Statistics.OWN,
        )
    query, along = _with_support(request)
    loop = InnerLoop(request.derivatives, state, request.episodes, rule)
    outputs = []
    for steps in range(request.inner_steps + 1):
        if steps:
            loop.inner_step(steps - 1)
        norm = state.norm_pass(max(steps - 1, 0), request.statistics, along)
        outputs.append(query.logits(loop.fast, norm)[:, along:])
    return torch.stack(outputs)


def features_of_sets(
    request: PredictRequest, of_support: Statistics = Statistics.OWN
) -> tuple[Tensor, Tensor]:
    """Pass both sets through the body at the state's weights -> f_TEF of the support and the query set.

    `of_support` chooses the statistics that normalise the support set.
    """
    state, episodes = request.state, request.episodes
    slow = expanded(body_of(state.slow), len(episodes.support_y_TE))
    support = request.derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
    support_TEF, _ = support.features(slow, state.norm_pass(0, of_support))
    query, along = _with_support(request)
    query_TEF, _ = query.features(slow, state.norm_pass(0, request.statistics, along))
    return support_TEF, query_TEF[:, along:]


def comparable_features(request: PredictRequest) -> tuple[Tensor, Tensor]:
    """Compute the features of both sets for distances between them.

    With Statistics.RUNNING both sets use the running statistics, since features that were normalised in
    different ways cannot be compared. The weights are not adapted, so these statistics fit them.
    """
    running = request.statistics is Statistics.RUNNING
    return features_of_sets(request, Statistics.RUNNING if running else Statistics.OWN)


def _with_support(request: PredictRequest) -> tuple[PreparedSet, int]:
    """Prepare the query set, preceded by the support set with Statistics.SUPPORT.

    Returns:
        The prepared set, and the number of leading support examples in it.
    """
    derivatives, episodes = request.derivatives, request.episodes
    if request.statistics is not Statistics.SUPPORT:
        return derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE), 0
    both_TECHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], dim=1)
    along = episodes.support_y_TE.shape[1]
    return derivatives.prepare(both_TECHW, episodes.query_y_TE, along), along
