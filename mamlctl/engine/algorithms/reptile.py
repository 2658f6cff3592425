"""Reptile: interpolation towards the adapted weights."""

from __future__ import annotations

import torch

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.measured_loop import _InnerLoop
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.inner_loop import AdamSteps, MetaState
from mamlctl.engine.nets.base import Net


@torch.no_grad()
def reptile(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
    *,
    engine: str,
    inner_optimizer: str,
) -> MetaStepResult:
    """Reptile (Nichol et al. 2018, arXiv:1803.02999): the way back from the tasks' adapted weights.

    So that an outer step of SGD with rate e moves the slow weights by e towards their mean. The query set is
    only looked at.
    """
    derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
    tasks = len(episodes.support_y_TE)
    adam = AdamSteps(state, tasks) if inner_optimizer == "adam" else None
    inner = _InnerLoop(derivatives, state, episodes, adam or state.stepped)
    for step in range(ask.inner_steps):
        if ask.measure_all:
            inner.look(step)
        inner.step(step)
    inner.look(ask.inner_steps)
    grads = {name: weight - inner.fast[name].mean(0) for name, weight in state.slow.items()}
    return inner.measured(grads, {} if adam is None else adam.moments())
