"""Predict the query set of a task with a trained state.

A predictor returns outputs_ITEN, class scores or values after 0, 1, ..., I inner steps: I + 1 entries. A
request for the last step alone saves the other passes of the query set, most of the time of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.interface import Derivatives, PreparedSet
from mamlctl.engine.evaluation.measured_loop import InnerLoop, TaskSets
from mamlctl.engine.inner_loop import DESCENT, InnerRule, MetaState, expanded
from mamlctl.engine.nets.base import HEAD, HeadNet, body_of
from mamlctl.engine.nets.batch_norm import Params, Statistics


@dataclass(frozen=True)
class PredictRequest:
    """The tasks to predict, and the state that adapts to them."""

    sets: TaskSets
    state: MetaState  # frozen
    inner_steps: int  # I
    statistics: Statistics  # of the query set; the inner loop normalises the support set by its own
    per_step: bool = True  # whether to predict after every inner step; else only after the last

    @property
    def derivatives(self) -> Derivatives:
        """Those of the network."""
        return self.sets.derivatives

    @property
    def episodes(self) -> Episodes:
        """The tasks."""
        return self.sets.episodes

    def query(self) -> tuple[PreparedSet, int]:
        """Return the prepared query set, and the number of support examples in front of it.

        With Statistics.SUPPORT the support set passes through the network with the queries.
        """
        if self.statistics is Statistics.SUPPORT:
            return self.sets.query_after_support
        return self.sets.query, 0


# Adapts the state as its algorithm does -> outputs_ITEN, with a single entry if only the last is requested.
Predict = Callable[[PredictRequest], Tensor]


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
    """Predict after each of 0, 1, ..., I inner steps, or the last, from the state's weights -> outputs_ITEN.

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
        features = replace(request.episodes, support_x_TECHW=support_TEF, query_x_TECHW=query_TEF)
        sets = TaskSets(Autograd(HeadNet(net.outputs, net.objective)), features)
        request = replace(request, sets=sets, state=state, statistics=Statistics.OWN)
    query, along = request.query()
    loop = InnerLoop(request.sets, state, rule)
    outputs = []
    for steps in range(request.inner_steps + 1):
        if steps:
            loop.inner_step(steps - 1)
        if steps < request.inner_steps and not request.per_step:
            continue
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
    support_TEF = request.sets.support.features(slow, state.norm_pass(0, of_support))
    query, along = request.query()
    query_TEF = query.features(slow, state.norm_pass(0, request.statistics, along))
    return support_TEF, query_TEF[:, along:]


def comparable_features(request: PredictRequest) -> tuple[Tensor, Tensor]:
    """Compute the features of both sets for distances between them.

    With Statistics.RUNNING both sets use the running statistics, since features that were normalised in
    different ways cannot be compared. The weights are not adapted, so these statistics fit them.
    """
    running = request.statistics is Statistics.RUNNING
    return features_of_sets(request, Statistics.RUNNING if running else Statistics.OWN)
