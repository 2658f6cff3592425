"""The first epochs of a run with --body-epochs, which train only the body.

One inner step from a head of zeros gives, up to a factor, these weights of class n:

    W_n = c_n - c

with c_n the mean of the features f over the support examples of the class, and c the mean of all c_n. The
body learns to classify the query examples by them, with the logits <f, W_n> / sqrt(F) for F features. Since
the weights can be computed for any number of classes, a meta-batch of T tasks with N classes is one problem
with T*N classes. Each set passes through the body once forward and once backward, where an inner loop over
all layers takes a pass per step, and more classes are a harder problem.

Up to the factor, this is ANIL (arXiv:1909.09157) with one step and a head of zeros. Prototypical networks
(arXiv:1703.05175) differ in the logits, which are distances to c_n. Measurements: docs/speedrun.md.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.anil import BodyFeatures
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.evaluation.prediction import prototypes
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net


def body_start(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest, *, engine: EngineName
) -> MetaStepResult:
    """Compute the gradient of the query loss over all classes of the meta-batch.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`; `request` is not used. The norm rows of
            all inner steps are equal.
        engine: the --engine setting.

    Returns:
        As in `meta_gradient.Outer`, with the loss as the query loss after 0 inner steps. All norm rows have
        the same gradient, so that they stay equal. The gradients of the head and of learnt rates are 0.
    """
    classes = len(episodes.query_y_TE) * net.outputs
    episodes = as_one_task(episodes, net.outputs)

    def logits_of(support_1EF: Tensor, query_1EF: Tensor) -> Tensor:
        means_1NF = prototypes(support_1EF, episodes.support_y_TE, classes)
        weights_1NF = means_1NF - means_1NF.mean(1, keepdim=True)
        return query_1EF @ weights_1NF.transpose(1, 2) / math.sqrt(query_1EF.shape[-1])

    result = BodyFeatures(net, state, episodes, engine).gradient(net, state, logits_of)
    grads = result.grads
    for rows_RC in (grads[name] for name in state.norm):
        rows_RC[1:] = rows_RC[0]
    for name, tensor in state.learnable().items():
        if name not in grads:
            grads[name] = torch.zeros_like(tensor)
    # The running statistics of all inner steps are equal too.
    rows = range(max(map(len, state.running.values()), default=1))
    return replace(
        result, norm_passes=[replace(norm, step=row) for row in rows for norm in result.norm_passes]
    )


def as_one_task(episodes: Episodes, ways: int) -> Episodes:
    """Combine T tasks into a single task with the classes of all of them: task t has labels from t * `ways`.

    A class that is in two tasks becomes two classes.
    """
    first_T1 = ways * torch.arange(len(episodes.query_y_TE), device=episodes.query_y_TE.device).unsqueeze(1)

    def joined(x_TE: Tensor) -> Tensor:
        return x_TE.flatten(0, 1).unsqueeze(0)

    keys_T = episodes.keys_T
    return Episodes(
        joined(episodes.support_x_TECHW),
        joined(episodes.support_y_TE + first_T1),
        joined(episodes.query_x_TECHW),
        joined(episodes.query_y_TE + first_T1),
        keys_T=None if keys_T is None else keys_T[:1],
    )
