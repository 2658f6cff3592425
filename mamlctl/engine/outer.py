"""Meta-gradients: how the query losses after the inner loop become gradients of what is meta-learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlctl.data.episodes import Episodes
from mamlctl.engine.inner import MetaState, adapt, query_logits
from mamlctl.engine.nets import Net, cross_entropy
from mamlctl.engine.norms import NormPass


@dataclass(frozen=True)
class Measured:
    """What one meta-step measured, on the device; the outer optimiser has not moved yet."""

    grads: dict[str, Tensor]  # like MetaState.learnable()
    meta_loss: Tensor  # scalar
    support_losses_I: Tensor
    query_losses: dict[int, Tensor]  # inner steps taken -> mean over tasks
    query_accuracies: dict[int, Tensor]
    norm_passes: list[NormPass]  # those that training made, whose statistics accumulate


def counts(weight: float | Tensor) -> bool:
    """Whether a query loss of this weight is part of the meta-loss."""
    return isinstance(weight, Tensor) or weight != 0


def accuracy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Share of examples whose class has the largest score."""
    return (logits_TEN.detach().argmax(-1) == y_TE).float().mean()


def unrolled(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    msl_weights: Sequence[float | Tensor],
    first_order: bool,
    measure_all: bool,
) -> Measured:
    """Differentiate through the unrolled inner loop: the plain engine, which faster ones are held to.

    `msl_weights`: weight of the query loss after step 1..I; a weight of 0 costs no training pass, a tensor
    counts whatever its value, so that nobody has to ask the device.
    `measure_all`: also measure the query losses that have no weight, without a graph.
    """
    learnable = state.learnable()
    meta_loss = episodes.support_x_TECHW.new_zeros(())
    support_losses: list[Tensor] = []
    query_losses: dict[int, Tensor] = {}
    accuracies: dict[int, Tensor] = {}
    passes: list[NormPass] = []
    weights: tuple[float | Tensor, ...] = (0.0, *msl_weights)
    support = episodes.support_x_TECHW, episodes.support_y_TE
    for point in adapt(net, state, *support, steps=inner_steps, first_order=first_order):
        if point.support_loss_T is not None and point.norm is not None:
            support_losses.append(point.support_loss_T.mean())
            passes.append(point.norm)
        weight = weights[point.steps]
        counted = counts(weight)
        if not (counted or measure_all):
            continue
        with torch.set_grad_enabled(counted):
            logits_TEN, norm = query_logits(net, state, point, episodes.query_x_TECHW)
            loss = cross_entropy(logits_TEN, episodes.query_y_TE).mean()
        if counted:
            meta_loss = meta_loss + weight * loss
            passes.append(norm)
        query_losses[point.steps] = loss.detach()
        accuracies[point.steps] = accuracy(logits_TEN, episodes.query_y_TE)
    grads = torch.autograd.grad(meta_loss, list(learnable.values()), materialize_grads=True)
    return Measured(
        dict(zip(learnable, grads, strict=True)),
        meta_loss.detach(),
        torch.stack(support_losses),
        query_losses,
        accuracies,
        passes,
    )
