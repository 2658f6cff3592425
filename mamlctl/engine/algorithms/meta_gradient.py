"""Meta-gradients: how the query losses after the inner loop become gradients of what is meta-learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.inner_loop import MetaState, adapt, query_logits
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params


@dataclass(frozen=True)
class MetaStepResult:
    """What one meta-step measured, on the device; the outer optimiser has not moved yet."""

    grads: dict[str, Tensor]  # like MetaState.learnable()
    meta_loss: Tensor  # scalar
    support_losses_I: Tensor
    query_losses: dict[int, Tensor]  # inner steps taken -> mean over tasks
    query_scores: dict[int, Tensor]  # the same, of the objective's metric
    norm_passes: list[NormPass]  # those that training made, whose statistics accumulate
    moments: Params = field(default_factory=dict)  # what the inner Adam hands on, like MetaState.moments


def counts(weight: float | Tensor) -> bool:
    """Whether a query loss of this weight is part of the meta-loss."""
    return isinstance(weight, Tensor) or weight != 0


@dataclass(frozen=True)
class MetaStepRequest:
    """What a meta-step is to find out."""

    inner_steps: int
    msl_weights: Sequence[
        float | Tensor
    ]  # of the query loss after step 1..I; a weight of 0 costs no training
    # pass, a tensor counts whatever its value, so that nobody has to ask the device
    first_order: bool
    measure_all: bool  # also measure the query losses that have no weight, without a graph


class Outer(Protocol):
    """How query losses become gradients of what is meta-learnt; one of these is an algorithm's heart."""

    def __call__(
        self, net: Net, state: MetaState, episodes: Episodes, ask: MetaStepRequest
    ) -> MetaStepResult:
        """One meta-batch. Weights and order mean nothing to those that do not unroll the inner loop."""


@dataclass
class Unrolled:
    """An inner loop with its graph, and the query losses along it."""

    meta_loss: Tensor
    support_losses: list[Tensor] = field(default_factory=list)
    query_losses: dict[int, Tensor] = field(default_factory=dict)
    query_scores: dict[int, Tensor] = field(default_factory=dict)
    passes: list[NormPass] = field(default_factory=list)

    def measured(self, grads: dict[str, Tensor]) -> MetaStepResult:
        """With the gradients of what is meta-learnt."""
        losses = torch.stack(self.support_losses)
        found = self.query_losses, self.query_scores, self.passes
        return MetaStepResult(grads, self.meta_loss.detach(), losses, *found)


def unrolled(net: Net, state: MetaState, episodes: Episodes, ask: MetaStepRequest) -> MetaStepResult:
    """Differentiate through the unrolled inner loop: the plain engine, which faster ones are held to."""
    learnable = state.learnable()
    found = unroll(net, state, episodes, ask)
    grads = torch.autograd.grad(found.meta_loss, list(learnable.values()), materialize_grads=True)
    return found.measured(dict(zip(learnable, grads, strict=True)))


def unroll(net: Net, state: MetaState, episodes: Episodes, ask: MetaStepRequest) -> Unrolled:
    """The inner loop and the meta-loss, to be differentiated."""
    found = Unrolled(episodes.support_x_TECHW.new_zeros(()))
    weights: tuple[float | Tensor, ...] = (0.0, *ask.msl_weights)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    for point in adapt(net, state, *support, steps=ask.inner_steps, first_order=ask.first_order):
        if point.support_loss_T is not None and point.norm is not None:
            found.support_losses.append(point.support_loss_T.mean())
            found.passes.append(point.norm)
        weight = weights[point.steps]
        counted = counts(weight)
        if not (counted or ask.measure_all):
            continue
        with torch.set_grad_enabled(counted):
            outputs_TEN, norm = query_logits(net, state, point, episodes.query_x_TECHW)
            loss = net.objective.loss(outputs_TEN, episodes.query_y_TE).mean()
        if counted:
            found.meta_loss = found.meta_loss + weight * loss
            found.passes.append(norm)
        found.query_losses[point.steps] = loss.detach()
        score_T = net.objective.score(outputs_TEN.detach(), episodes.query_y_TE)
        found.query_scores[point.steps] = score_T.mean()
    return found


def _without_steps(
    grads: dict[str, Tensor], loss: Tensor, score: Tensor, passes: list[NormPass]
) -> MetaStepResult:
    """Of an algorithm that trains without an inner loop: a loss after 0 steps."""
    return MetaStepResult(grads, loss, loss.new_zeros(0), {0: loss}, {0: score}, passes)
