"""How a trained state predicts a task's query set, by the kinds of algorithms.

Each predictor returns outputs_ITEN: class scores (or values) after 0, 1 ... inner steps, that many and one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.interface import Autograd, Derivatives
from mamlctl.engine.inner_loop import AdamSteps, MetaState, Stepper, pulled
from mamlctl.engine.nets.base import HEAD, HeadNet
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics


class Predict(Protocol):
    """Adapt a state to tasks, as its algorithm does, and predict."""

    def __call__(
        self,
        derivatives: Derivatives,
        state: MetaState,
        episodes: Episodes,
        *,
        inner_steps: int,
        statistics: Statistics,
    ) -> Tensor:
        """-> outputs_ITEN."""


def body_of(weights: Mapping[str, Tensor]) -> Params:
    """All weights but the head's."""
    return {name: weight for name, weight in weights.items() if name not in HEAD}


def head_state(state: MetaState) -> MetaState:
    """The head alone, with its rates."""
    slow = {name: state.slow[name] for name in HEAD}
    rates = {name: rate for name, rate in state.rates.items() if name in HEAD}
    moments = {name: moment for name, moment in state.moments.items() if name in HEAD or name == "steps"}
    return MetaState(slow, {}, rates, {}, state.rates_learnt, moments)


def expanded(slow: Mapping[str, Tensor], tasks: int) -> Params:
    """Every task's copy, without copying."""
    return {name: weight.detach().expand(tasks, *weight.shape) for name, weight in slow.items()}


def mini_batch(episodes: Episodes, step: int) -> tuple[Tensor, Tensor] | None:
    """The support examples of an inner step, x_TBCHW and y_TB; None where every step sees all."""
    if episodes.batches_TIB is None:
        return None
    at_TB = episodes.batches_TIB[:, step]
    task_T1 = torch.arange(len(at_TB), device=at_TB.device).unsqueeze(1)
    return episodes.support_x_TECHW[task_T1, at_TB], episodes.support_y_TE[task_T1, at_TB]


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
    """Squared Euclidean distance of every example to the nearest support example of each class -> _TEN."""
    distances_TEM = class_distances(f_TEF, support_TMF)
    tasks, examples, _ = distances_TEM.shape
    farthest_TEN = distances_TEM.new_full((tasks, examples, ways), torch.inf)
    return farthest_TEN.scatter_reduce(2, y_TM.unsqueeze(1).expand_as(distances_TEM), distances_TEM, "amin")


def adapted(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
    proximal: float | None = None,
    inner_optimizer: str | None = None,
) -> Tensor:
    """Gradient steps on the support set, from the state's weights -> outputs_ITEN.

    With Statistics.SUPPORT the support set goes along with the queries, so that every layer's statistics are
    those of the same weights. Where the head alone is adapted, the body is passed once.
    """
    if state.rates.keys() <= set(HEAD) and all(
        len(rows) == 1 for rows in (state.norm | state.running).values()
    ):
        support_TEF, query_TEF = _features(derivatives, state, episodes, statistics)
        features = Episodes(
            support_TEF, episodes.support_y_TE, query_TEF, episodes.query_y_TE, None, episodes.batches_TIB
        )
        derivatives = Autograd(HeadNet(derivatives.net.outputs, derivatives.net.objective))
        episodes, state, statistics = features, head_state(state), Statistics.OWN
    query, along = _with_support(derivatives, episodes, statistics)
    adapting = fast_weights(derivatives, state, episodes, inner_steps, proximal, inner_optimizer)
    outputs = []
    for step, fast in enumerate(adapting):
        norm = NormPass(state.norm, state.running, max(step - 1, 0), statistics, along)
        outputs.append(derivatives.logits(fast, query, norm)[:, along:])
    return torch.stack(outputs)


def fast_weights(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    inner_steps: int,
    proximal: float | None = None,
    inner_optimizer: str | None = None,
) -> Iterator[Params]:
    """The weights of every task after 0, 1 ... inner steps on its support set."""
    tasks = len(episodes.support_y_TE)
    stepped: Stepper = state.stepped if proximal is None else pulled(state, proximal)
    if inner_optimizer == "adam":
        stepped = AdamSteps(state, tasks)
    support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
    fast = expanded(state.slow, tasks)
    yield fast
    for step in range(inner_steps):
        norm = NormPass(state.norm, state.running, step)
        batch = mini_batch(episodes, step)
        prepared = support if batch is None else derivatives.prepare(*batch)
        fast = stepped(fast, derivatives.gradient(fast, prepared, norm).fast, step)
        yield fast


def _with_support(derivatives: Derivatives, episodes: Episodes, statistics: Statistics) -> tuple[object, int]:
    """The query set, with Statistics.SUPPORT behind the support set; and how many examples that is."""
    if statistics is not Statistics.SUPPORT:
        return derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE), 0
    both_TECHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], dim=1)
    along = episodes.support_y_TE.shape[1]
    return derivatives.prepare(both_TECHW, episodes.query_y_TE, along), along


def _features(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    statistics: Statistics,
    of_support: Statistics = Statistics.OWN,
) -> tuple[Tensor, Tensor]:
    """What the head reads of the support and the query set under the state's weights -> two _TEF."""
    slow = expanded(body_of(state.slow), len(episodes.support_y_TE))
    support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
    support_TEF, _ = derivatives.features(slow, support, NormPass(state.norm, state.running, 0, of_support))
    query, along = _with_support(derivatives, episodes, statistics)
    norm = NormPass(state.norm, state.running, 0, statistics, along)
    query_TEF, _ = derivatives.features(slow, query, norm)
    return support_TEF, query_TEF[:, along:]


def comparable_features(
    derivatives: Derivatives, state: MetaState, episodes: Episodes, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Features of both sets that can be compared: running statistics, which no weight leaves, for both."""
    of_support = Statistics.RUNNING if statistics is Statistics.RUNNING else Statistics.OWN
    return _features(derivatives, state, episodes, statistics, of_support)
