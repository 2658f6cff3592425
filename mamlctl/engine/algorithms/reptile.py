"""Reptile: interpolation towards the adapted weights.

Algorithm 2 of Nichol, Achiam & Schulman 2018 (arXiv:1803.02999): with w_I a task's weights after its inner
loop,

    w0 = w0 + e mean over tasks of (w_I - w0)

So the gradient is w0 - mean w_I, and the outer step one of SGD with rate e.
"""

from __future__ import annotations

import torch

from mamlctl.core.literals import EngineName, InnerOptimizer
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop
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
    """The way back from the tasks' adapted weights; the query set is only measured.

    `inner_optimizer`: "adam", whose moments the result hands on, or "sgd".
    """
    derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
    loop = InnerLoop(derivatives, state, episodes, InnerRule(optimizer=inner_optimizer))
    loop.run(request.inner_steps, measure_all=request.measure_all)
    loop.record_query_loss(request.inner_steps)
    grads = {name: weight - loop.fast[name].mean(0) for name, weight in state.slow.items()}
    loss = loop.measurements.query_losses[request.inner_steps]
    moments = loop.update.moments() if isinstance(loop.update, AdamSteps) else None
    return MetaStepResult.of(loop.measurements, grads, loss, moments)
