"""MAML's meta-gradient by plain double backward, and what every algorithm's meta-gradient is asked for.

Equation 1 of Finn, Abbeel & Levine 2017 (arXiv:1703.03400), with the multi-step loss of Antoniou et al. 2019
(arXiv:1810.09502, section 4): with w_0 the slow weights, a_k the inner rates and v_k the weights of MSL,

    w_{k+1} = w_k - a_k grad L_support(w_k)        meta-loss = mean over tasks of  sum_k v_k L_query(w_k)

and the meta-gradient is its derivative by w_0, the a_k and the rows of batch norm. In first order the support
gradients count as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.inner_loop import Measurements, MetaState, adapt, query_logits
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params


@dataclass(frozen=True)
class MetaStepRequest:
    """What a meta-step is to find out."""

    inner_steps: int
    # Of the query loss after step 1..I. A weight of 0 costs no training pass; a tensor counts whatever its
    # value, so that nobody has to ask the device.
    msl_weights: Sequence[float | Tensor]
    first_order: bool
    measure_all: bool  # also measure the query losses that have no weight, without a graph


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

    @classmethod
    def of(
        cls,
        measurements: Measurements,
        grads: dict[str, Tensor],
        meta_loss: Tensor,
        moments: Params | None = None,
    ) -> MetaStepResult:
        """What was measured along an inner loop, with the gradients of what is meta-learnt."""
        losses = measurements.support_losses
        return cls(
            grads,
            meta_loss.detach(),
            torch.stack(losses) if losses else meta_loss.new_zeros(0),
            dict(sorted(measurements.query_losses.items())),
            dict(sorted(measurements.query_scores.items())),
            measurements.norm_passes,
            moments or {},
        )


class Outer(Protocol):
    """How query losses become gradients of what is meta-learnt; one of these is an algorithm's heart."""

    def __call__(
        self, net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
    ) -> MetaStepResult:
        """Measure one meta-batch.

        Args:
            net: the network, as a function of its weights.
            state: the slow weights, norm rows and rates; the learnable ones require gradients.
            episodes: a meta-batch of T tasks.
            request: inner steps, weights of the query losses, order, and what to measure besides; weights
                and order mean nothing to those that do not unroll the inner loop.

        Returns:
            Gradients of the mean over tasks, like MetaState.learnable(), and what was measured on the way.
        """


def enters_meta_loss(weight: float | Tensor) -> bool:
    """Whether a query loss of this weight is part of the meta-loss."""
    return isinstance(weight, Tensor) or weight != 0


def unrolled(net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
    """Differentiate through the unrolled inner loop: the plain engine, which faster ones are held to."""
    learnable = state.learnable()
    measurements, meta_loss = unroll(net, state, episodes, request)
    grads = torch.autograd.grad(meta_loss, list(learnable.values()), materialize_grads=True)
    return MetaStepResult.of(measurements, dict(zip(learnable, grads, strict=True)), meta_loss)


def unroll(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
) -> tuple[Measurements, Tensor]:
    """What is measured along the inner loop, and the meta-loss, to be differentiated."""
    measurements = Measurements(net.objective)
    meta_loss = episodes.support_x_TECHW.new_zeros(())
    # Before the first step the query loss is measured only.
    weights: tuple[float | Tensor, ...] = (0.0, *request.msl_weights)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    for point in adapt(net, state, *support, steps=request.inner_steps, first_order=request.first_order):
        if point.support_loss_T is not None and point.norm is not None:
            measurements.add_support(point.support_loss_T, point.norm)
        weight = weights[point.steps]
        counted = enters_meta_loss(weight)
        if not (counted or request.measure_all):
            continue
        with torch.set_grad_enabled(counted):
            outputs_TEN, norm = query_logits(net, state, point, episodes.query_x_TECHW)
            loss = measurements.add_query(point.steps, outputs_TEN, episodes.query_y_TE)
        if counted:
            meta_loss = meta_loss + weight * loss
            measurements.norm_passes.append(norm)
    return measurements, meta_loss
