"""Prototypical networks: the nearest class mean in learnt features."""

from __future__ import annotations

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.anil import _Bodies
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, _without_steps
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.evaluation.prediction import class_distances, comparable_features, prototypes
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Statistics


def protonet(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
    *,
    engine: str,
) -> MetaStepResult:
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175): no inner loop, one ordinary gradient."""
    body = _Bodies(net, state, episodes, engine)
    with torch.enable_grad():
        support_TEF, query_TEF = body.features
        logits_TEN = -class_distances(query_TEF, prototypes(support_TEF, episodes.support_y_TE, net.outputs))
        loss = net.objective.loss(logits_TEN, episodes.query_y_TE).mean()
        grads = torch.autograd.grad(loss, body.features)
    score = net.objective.score(logits_TEN.detach(), episodes.query_y_TE).mean()
    return _without_steps(body.back(state, grads), loss.detach(), score, body.passes)


def by_prototypes(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
) -> Tensor:
    """The class of the nearest prototype (Snell et al. 2017)."""
    support_TEF, query_TEF = comparable_features(derivatives, state, episodes, statistics)
    prototypes_TNF = prototypes(support_TEF, episodes.support_y_TE, derivatives.net.outputs)
    return -class_distances(query_TEF, prototypes_TNF).unsqueeze(0)
