"""MAML's meta-gradient by double backward, and the interface that every algorithm's meta-gradient has.

The gradient in equation 1 of Finn, Abbeel & Levine 2017 (arXiv:1703.03400), with the multi-step loss (MSL) of
Antoniou et al. 2019 (arXiv:1810.09502, section 4). With w_0 the slow weights, a_k the inner rates, f_k the
batch-norm rows and v_k the MSL weights (0, .., 0, 1 without MSL),

    w_{k+1}   = w_k - a_k grad_w L_support(w_k; f_k)        k = 0 .. I-1
    meta-loss = mean over tasks of  sum_k v_k L_query(w_{k+1}; f_k)

and the meta-gradient is the derivative of the meta-loss with respect to w_0, to f_k and, if they are learnt,
to a_k. First order treats the support gradients as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The settings of one meta-step that change during a run."""

    inner_steps: int  # I
    # v_k, the weights of the query losses after 1, 2, ..., I inner steps. A weight of 0 saves the training
    # pass. A tensor enters the meta-loss whatever its value, because reading it would synchronise with the
    # device.
    msl_weights: Sequence[float | Tensor]
    first_order: bool
    measure_all: bool  # also measure the query losses that do not enter the meta-loss
    body_only: bool = False  # train only the body; see body_start.py
    # The mean over the tasks of all processes, from that of this process, for steps that need it at once.
    mean: Callable[[Tensor], Tensor] = lambda mean_of_own: mean_of_own


@dataclass(frozen=True)
class MetaStepResult:
    """The meta-gradient and measurements of one meta-step, on the device; no weight has changed yet."""

    grads: dict[str, Tensor]  # names and shapes of MetaState.learnable(); maybe of frozen tensors too
    meta_loss: Tensor  # scalar
    support_losses_I: Tensor  # before inner step 1, 2, ..., I; means over tasks
    query_losses: dict[int, Tensor]  # inner steps taken -> mean over tasks
    query_scores: dict[int, Tensor]  # the same for the objective's metric
    norm_passes: list[NormPass]  # training passes; their statistics update the running ones
    moments: Params = field(default_factory=dict)  # the new MetaState.moments of the inner Adam
    votes: Tensor | None = None  # requests to stop of all ranks; None with a single process

    @classmethod
    def of(
        cls,
        measurements: Measurements,
        grads: dict[str, Tensor],
        meta_loss: Tensor,
        moments: Params | None = None,
    ) -> MetaStepResult:
        """Combine the measurements along an inner loop with the meta-gradient.

        Args:
            measurements: losses, scores and norm passes.
            grads: the meta-gradient, by the names of MetaState.learnable().
            meta_loss: the meta-loss, a scalar.
            moments: the inner Adam's new moments, if there is one.
        """
        support_losses_T = measurements.support_losses_T
        return cls(
            grads,
            meta_loss.detach(),
            torch.stack(support_losses_T).mean(1) if support_losses_T else meta_loss.new_zeros(0),
            means(measurements.query_losses_T),
            means(measurements.query_scores_T),
            measurements.norm_passes,
            moments or {},
        )


def means(values_T: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the mean over tasks for each number of inner steps, in ascending order."""
    if not values_T:
        return {}
    steps = sorted(values_T)
    return dict(zip(steps, torch.stack([values_T[step] for step in steps]).mean(1).unbind(), strict=True))


class Outer(Protocol):
    """The meta-gradient of an algorithm."""

    def __call__(
        self, net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
    ) -> MetaStepResult:
        """Compute the meta-gradient of one meta-batch.

        Args:
            net: the network.
            state: the slow weights, norm rows and rates; the learnable ones require gradients.
            episodes: a meta-batch of T tasks.
            request: inner steps, MSL weights, derivative order and what to measure; algorithms that do not
                unroll the inner loop ignore the weights and the order.

        Returns:
            The gradient of the mean over tasks, and the measurements along the inner loop.
        """


def enters_meta_loss(weight: float | Tensor) -> bool:
    """Whether a query loss with this weight is part of the meta-loss."""
    return isinstance(weight, Tensor) or weight != 0


def unrolled(net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
    """Differentiate through the unrolled inner loop: --engine plain, the reference for the faster ones.

    Arguments and result as in `Outer`.
    """
    learnable = state.learnable()
    measurements, meta_loss = unroll(net, state, episodes, request)
    grads = torch.autograd.grad(meta_loss, list(learnable.values()), materialize_grads=True)
    return MetaStepResult.of(measurements, dict(zip(learnable, grads, strict=True)), meta_loss)


def unroll(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
) -> tuple[Measurements, Tensor]:
    """Run the inner loop with its graph; arguments as in `Outer`.

    Returns:
        The measurements, and the meta-loss, which can be differentiated.
    """
    measurements = Measurements(net.objective)
    meta_loss = episodes.support_x_TECHW.new_zeros(())
    # The query loss before the first step never enters the meta-loss.
    weights: tuple[float | Tensor, ...] = (0.0, *request.msl_weights)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    loop = adapt(
        net,
        state,
        *support,
        steps=request.inner_steps,
        first_order=request.first_order,
        keys_T=episodes.support_keys_T,
    )
    for point in loop:
        if point.support_loss_T is not None and point.norm is not None:
            measurements.add_support(point.support_loss_T, point.norm)
        weight = weights[point.steps]
        counted = enters_meta_loss(weight)
        if not (counted or request.measure_all):
            continue
        with torch.set_grad_enabled(counted):
            outputs_TEN, norm = query_logits(net, state, point, episodes.query_x_TECHW, episodes.query_keys_T)
            loss = measurements.add_query(point.steps, outputs_TEN, episodes.query_y_TE).mean()
        if counted:
            meta_loss = meta_loss + weight * loss
            measurements.norm_passes.append(norm)
    return measurements, meta_loss
