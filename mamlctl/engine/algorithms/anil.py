"""ANIL: the inner loop changes the head alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, unroll
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.prediction import (
    body_of,
    expanded,
    head_state,
)
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.nets.base import HEAD, HeadNet, Net
from mamlctl.engine.nets.batch_norm import NormPass


def anil(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
    *,
    engine: str,
) -> MetaStepResult:
    """ANIL (Raghu et al. 2020, arXiv:1909.09157): the inner loop changes the head alone.

    So the body is passed once forward and once backward a set, and what is unrolled is a linear layer.
    Arguments are those of `meta_gradient.unrolled`.
    """
    body = _Bodies(net, state, episodes, engine)
    with torch.enable_grad():
        learnt = {
            name: tensor
            for name, tensor in state.learnable().items()
            if name in HEAD or name.startswith(RATE)
        }
        found = unroll(
            HeadNet(net.outputs, net.objective),
            head_state(state),
            body.as_episodes(),
            ask,
        )
        wanted = [*learnt.values(), *body.features]
        grads = torch.autograd.grad(found.meta_loss, wanted, materialize_grads=True)
    found.passes = body.passes  # the head has no norm
    return found.measured(body.back(state, grads[len(learnt) :]) | dict(zip(learnt, grads, strict=False)))


class _Bodies:
    """The features of both sets of every task, and the way back from their gradients."""

    def __init__(self, net: Net, state: MetaState, episodes: Episodes, engine: str) -> None:
        self.derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
        self.episodes, self.tasks = episodes, len(episodes.support_y_TE)
        self.passes: list[NormPass] = []
        self.tapes = []
        self.features: list[Tensor] = []
        with torch.no_grad():
            slow = expanded(body_of(state.slow), self.tasks)
            for x_TECHW, y_TE in (
                (episodes.support_x_TECHW, episodes.support_y_TE),
                (episodes.query_x_TECHW, episodes.query_y_TE),
            ):
                norm = NormPass(state.norm, state.running, 0)
                f_TEF, tape = self.derivatives.features(slow, self.derivatives.prepare(x_TECHW, y_TE), norm)
                self.features.append(f_TEF.requires_grad_())
                self.tapes.append(tape)
                self.passes.append(norm)

    def as_episodes(self) -> Episodes:
        """The tasks with features for images."""
        support, query = self.features
        return Episodes(support, self.episodes.support_y_TE, query, self.episodes.query_y_TE)

    def back(self, state: MetaState, by_features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of the body's weights and the norm, summed over tasks and sets."""
        grads = {
            name: torch.zeros_like(weight) for name, weight in (body_of(state.slow) | state.norm).items()
        }
        with torch.no_grad():
            for tape, g_TEF in zip(self.tapes, by_features, strict=True):
                by_body, by_norm = self.derivatives.back_through(tape, g_TEF)
                for name, grad in by_body.items():
                    grads[name] += grad.sum(0)
                for name, grad in by_norm.items():
                    grads[name][0] += grad
        return {name: grad.detach() for name, grad in grads.items()}
