"""Prototypical networks: the nearest class mean in learnt features."""

from __future__ import annotations

import torch

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.anil import _Bodies
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, _without_steps
from mamlctl.engine.evaluation.prediction import (
    class_distances,
    prototypes,
)
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net


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
