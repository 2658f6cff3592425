"""The first epochs of a run with --body-epochs, which train only the body.

They are ANIL (arXiv:1909.09157) on larger problems: a meta-batch of T tasks with N classes is one task with
T*N classes, and its head is adapted from zeros by the inner steps. What differs from ANIL is that the head
is not learnt, and that the support loss is the sum over all classes divided by N. An example thus moves the
head as far as it does in a task of N classes, and the body is trained for the head that the inner loop makes
from it later.

Each set passes through the body once forward and once backward, where an inner loop over all layers takes
a pass per step, and more classes are a harder problem. Measurements: docs/speedrun.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.anil import anil
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.evaluation.prediction import zero_head
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import HEAD, Net, with_outputs


def body_start(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    inner_lr: float,
    engine: EngineName,
) -> MetaStepResult:
    """Compute the meta-gradient of the body on all classes of the meta-batch.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`; all inner steps have equal norm rows.
        inner_lr: the inner learning rate of the head.
        engine: the --engine setting.

    Returns:
        As in `meta_gradient.Outer`. All norm rows have the same gradient, so that they stay equal. The
        gradients of the head and of learnt rates are 0.
    """
    tasks = len(episodes.query_y_TE)
    outputs = tasks * net.outputs
    rate = state.example_tensor.new_full((1,), tasks * inner_lr)
    zeros = {name: tensor.requires_grad_() for name, tensor in zero_head(state.slow, outputs).items()}
    state_of_all = replace(
        state,
        slow=state.slow | zeros,
        rates=dict.fromkeys(HEAD, rate),
        rates_learnt=False,
    )
    episodes = as_one_task(episodes, net.outputs)
    result = anil(with_outputs(net, outputs), state_of_all, episodes, request, engine=engine)
    for rows_RC in (result.grads[name] for name in state.norm):
        rows_RC[1:] = rows_RC[0]
    of_body = {name: result.grads[name] for name in result.grads.keys() - set(HEAD)}
    rest = {
        name: torch.zeros_like(tensor) for name, tensor in state.learnable().items() if name not in of_body
    }
    return replace(result, grads=of_body | rest)


def as_one_task(episodes: Episodes, ways: int) -> Episodes:
    """Combine T tasks into a single task with the classes of all of them: task t has labels from t * `ways`.

    A class that is in two tasks becomes two classes.
    """
    first_T1 = ways * torch.arange(len(episodes.query_y_TE), device=episodes.query_y_TE.device).unsqueeze(1)

    def joined(x_TE: Tensor) -> Tensor:
        return x_TE.flatten(0, 1).unsqueeze(0)

    return Episodes(
        joined(episodes.support_x_TECHW),
        joined(episodes.support_y_TE + first_T1),
        joined(episodes.query_x_TECHW),
        joined(episodes.query_y_TE + first_T1),
    )
