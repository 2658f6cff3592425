"""Prototypical networks: predict the class whose mean feature is nearest.

Snell, Swersky & Zemel 2017 (arXiv:1703.05175), equations 1 and 2: with f the features and c_n the mean of f
over the support examples of class n,

    p(class n | x) = softmax over n of  -|f(x) - c_n|^2

There is no inner loop: the meta-gradient is the gradient of the query set's cross-entropy, through f(x) and
through the prototypes c_n.
"""

from __future__ import annotations

from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.anil import BodyFeatures
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.evaluation.prediction import (
    PredictRequest,
    class_distances,
    comparable_features,
    prototypes,
)
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net


def protonet(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest, *, engine: EngineName
) -> MetaStepResult:
    """Compute the gradient of the query loss.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`; `request` is not used.
        engine: the --engine setting.

    Returns:
        As in `meta_gradient.Outer`; the loss is recorded as the query loss after 0 inner steps.
    """

    def logits_of(support_TEF: Tensor, query_TEF: Tensor) -> Tensor:
        return -class_distances(query_TEF, prototypes(support_TEF, episodes.support_y_TE, net.outputs))

    return BodyFeatures(net, state, episodes, engine).gradient(net, state, logits_of)


def by_prototypes(request: PredictRequest) -> Tensor:
    """Predict the class of the nearest prototype -> outputs_1TEN; inner steps are ignored."""
    support_TEF, query_TEF = comparable_features(request)
    ways = request.derivatives.net.outputs
    prototypes_TNF = prototypes(support_TEF, request.episodes.support_y_TE, ways)
    return -class_distances(query_TEF, prototypes_TNF).unsqueeze(0)
