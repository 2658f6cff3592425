"""How a trained state predicts a task's query set: what several algorithms share.

Each predictor returns outputs_ITEN: class scores (or values) after 0, 1, ..., I inner steps (I + 1 entries).
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
    """Tasks to predict, and the state that adapts to them."""

    derivatives: Derivatives
    state: MetaState  # what was meta-learnt, frozen
    episodes: Episodes
    inner_steps: int  # I of the result
    statistics: Statistics  # what normalises the query set; the support set always has its own


# Adapt a state to tasks, as its algorithm does, and predict -> outputs_ITEN.
Predict = Callable[[PredictRequest], Tensor]


def prototypes(f_TEF: Tensor, y_TE: Tensor, ways: int) -> Tensor:
    """Mean feature of every class, of which one may have more examples than another -> _TNF."""
    is_of_TNE = (torch.arange(ways, device=y_TE.device).unsqueeze(1) == y_TE.unsqueeze(1)).to(f_TEF.dtype)
    return (is_of_TNE / is_of_TNE.sum(-1, keepdim=True)) @ f_TEF


def class_distances(f_TEF: Tensor, prototypes_TNF: Tensor) -> Tensor:
    """Squared Euclidean distance of every example to every prototype -> _TEN."""
    # |a - b|^2 written out: the direct difference is E x N x F numbers, 20 times the work at 20 ways.
    products_TEN = f_TEF @ prototypes_TNF.transpose(1, 2)
    return (
        f_TEF.square().sum(-1, keepdim=True) - 2 * products_TEN + prototypes_TNF.square().sum(-1).unsqueeze(1)
    )


def nearest_distances(f_TEF: Tensor, support_TMF: Tensor, y_TM: Tensor, ways: int) -> Tensor:
    """Squared Euclidean distance of every example to the nearest support example of each class -> _TEN.

    `y_TM`: labels of the M support examples; a class without any is infinitely far.
    """
    distances_TEM = class_distances(f_TEF, support_TMF)
    tasks, examples, _ = distances_TEM.shape
    farthest_TEN = distances_TEM.new_full((tasks, examples, ways), torch.inf)
    return farthest_TEN.scatter_reduce(2, y_TM.unsqueeze(1).expand_as(distances_TEM), distances_TEM, "amin")


def zero_head(weights: Mapping[str, Tensor], ways: int) -> Params:
    """A head of zeros for so many classes, of the type and device of the one in `weights`."""
    weight, bias = (weights[name] for name in HEAD)
    zeros = weight.new_zeros(ways, weight.shape[1]), bias.new_zeros(ways)
    return dict(zip(HEAD, zeros, strict=True))


def adapted(request: PredictRequest, rule: InnerRule = DESCENT) -> Tensor:
    """Gradient steps on the support set, from the state's weights -> outputs_ITEN.

    With Statistics.SUPPORT the support set goes along with the queries, so that every layer's statistics are
    those of the same weights. Where the head alone is adapted, the body is passed once.
    """
    state = request.state
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
    """What the head reads of the support and the query set under the state's weights -> two _TEF.

    `of_support` normalises the support set.
    """
    state, episodes = request.state, request.episodes
    slow = expanded(body_of(state.slow), len(episodes.support_y_TE))
    support = request.derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
    support_TEF, _ = support.features(slow, state.norm_pass(0, of_support))
    query, along = _with_support(request)
    query_TEF, _ = query.features(slow, state.norm_pass(0, request.statistics, along))
    return support_TEF, query_TEF[:, along:]


def comparable_features(request: PredictRequest) -> tuple[Tensor, Tensor]:
    """Features of both sets that can be compared: running statistics, which no weight leaves, for both."""
    running = request.statistics is Statistics.RUNNING
    return features_of_sets(request, Statistics.RUNNING if running else Statistics.OWN)


def _with_support(request: PredictRequest) -> tuple[PreparedSet, int]:
    """The query set, with Statistics.SUPPORT behind the support set; and how many examples that is."""
    derivatives, episodes = request.derivatives, request.episodes
    if request.statistics is not Statistics.SUPPORT:
        return derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE), 0
    both_TECHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], dim=1)
    along = episodes.support_y_TE.shape[1]
    return derivatives.prepare(both_TECHW, episodes.query_y_TE, along), along
