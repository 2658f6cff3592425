"""Reptile: interpolate the slow weights towards the adapted weights.

Nichol, Achiam & Schulman 2018 (arXiv:1803.02999), algorithm 2. With w_0 the slow weights, w_I a task's
weights after its inner loop and e the meta learning rate,

    w_0 = w_0 + e mean over tasks of (w_I - w_0)

This is a step of SGD with rate e along the gradient w_0 - mean of w_I.
"""

from __future__ import annotations

import torch

from mamlctl.core.literals import EngineName, InnerOptimizer
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop, TaskSets
from mamlctl.engine.inner_loop import AdamSteps, InnerRule, MetaState
from mamlctl.engine.nets.base import Net


@torch.no_grad()
def reptile(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    engine: EngineName,
    inner_optimizer: InnerOptimizer,
) -> MetaStepResult:
    """Compute the gradient w_0 - mean of w_I; the query set is measured but not trained on.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`.
        engine: the --engine setting.
        inner_optimizer: "adam", whose new moments the result contains, or "sgd".

    Returns:
        As in `meta_gradient.Outer`; the meta-loss is the query loss after the last inner step.
    """
    derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
    loop = InnerLoop(TaskSets(derivatives, episodes), state, InnerRule(optimizer=inner_optimizer))
    loop.run(request.inner_steps, measure_all=request.measure_all)
    loop.record_query_loss(request.inner_steps)
    grads = {name: weight - loop.fast[name].mean(0) for name, weight in state.slow.items()}
    loss = loop.measurements.query_losses_T[request.inner_steps].mean()
    moments = loop.update.moments() if isinstance(loop.update, AdamSteps) else None
    return MetaStepResult.of(loop.measurements, grads, loss, moments)
