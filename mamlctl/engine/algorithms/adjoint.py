"""MAML's meta-gradient without an unrolled graph: walk back through the inner steps with the adjoint.

With p the gradient of the meta-loss by the fast weights after a step, g the support gradient that made the
step and H the support loss's Hessian in front of it:

    by the rate   -<p, g>          by the weights before   p - H (rate p), plus their own query gradient
    by the norm row of the step    -(mixed second derivative) (rate p), plus the query's own

One Hessian-vector product a step, where double backward keeps every step's graph: only the fast weights of
each step stay, and what a product needs is made again where it was not kept. Query gradients are taken on the
way back too, where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, enters_meta_loss
from mamlctl.engine.derivatives.interface import Derivatives, Gradient
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Params

# Inner steps, counted from the last, whose passes are kept for the Hessian-vector products; earlier ones are
# made again, at 3 of 15 units of a step's convolutions. So memory stops growing after these.
KEPT = 5


@dataclass
class _Point:
    """What stays of an inner step until the walk back."""

    fast: Params  # before the step
    gradient: Gradient | None  # of the support loss there; None: to be made again


def adjoint(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    derivatives: Derivatives | None = None,
) -> MetaStepResult:
    """The meta-gradient of `meta_gradient.unrolled`, with memory that does not grow with the steps' graphs.

    `derivatives`: other than the fastest ones for the net.
    """
    steps, weights = request.inner_steps, request.msl_weights
    with torch.no_grad():
        derivatives = derivatives or select_derivatives(net, episodes.support_x_TECHW)
        walk = AdjointPass(derivatives, state, episodes, first_order=request.first_order)
        for step in range(steps):
            if request.measure_all and not (step and enters_meta_loss(weights[step - 1])):
                walk.record_query_loss(step)
            walk.inner_step(step, keep=step >= steps - KEPT)
        if request.measure_all and not enters_meta_loss(weights[-1]):
            walk.record_query_loss(steps)
        for step in reversed(range(steps)):
            if enters_meta_loss(weights[step]):
                walk.add_query_gradient(step, weights[step])
            walk.step_back(step)
        return walk.result()


class AdjointPass(InnerLoop):
    """Forward through the inner steps and back, all tasks of the episodes at once."""

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, *, first_order: bool
    ) -> None:
        super().__init__(derivatives, state, episodes)
        self.first_order, self.tasks = first_order, len(episodes.query_y_TE)
        self.adjoint = {name: torch.zeros_like(weight) for name, weight in self.fast.items()}
        self.grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
        self.meta_loss = episodes.support_x_TECHW.new_zeros(())
        self._points: list[_Point] = []

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """One inner step on the support set; `keep` what the walk back needs of it."""
        before = self.fast
        gradient = super().inner_step(step, keep=keep and not self.first_order)
        # In first order there are no products, and each step's gradient alone is small enough to be kept.
        self._points.append(_Point(before, gradient if keep or self.first_order else None))
        return gradient

    def add_query_gradient(self, step: int, weight: float | Tensor) -> None:
        """Add the weighted query loss after a step to the meta-loss, and its gradients to the adjoint."""
        query = self.query_gradient(step + 1)
        share = weight / self.tasks
        self.adjoint = {name: p + query.fast[name] * share for name, p in self.adjoint.items()}
        for name, grad in query.norm.items():
            self._gradient_row(name, step).add_(grad * share)
        self.meta_loss = self.meta_loss + weight * self.measurements.query_losses[step + 1]

    def step_back(self, step: int) -> None:
        """From the adjoint after a step to the adjoint before it."""
        point = self._points.pop()
        self.fast, support = point.fast, point.gradient
        if support is None:
            support = self.support_gradient(self.state.norm_pass(step), keep=True)
        if self.state.rates_learnt:
            # By the rate: -<p, g>, summed over whatever shares a rate.
            for name in self.state.rates:
                grad = self._gradient_row(f"{RATE}{name}", step)
                grad.sub_((self.adjoint[name] * support.fast[name]).sum_to_size(grad.shape))
        if self.first_order:
            return
        # What is not adapted has no rate: its direction is 0.
        direction = {
            name: p * self.state.rate(name, step) if name in self.state.rates else torch.zeros_like(p)
            for name, p in self.adjoint.items()
        }
        products, mixed = support.product(direction)
        self.adjoint = {name: p - products[name] for name, p in self.adjoint.items()}
        for name, grad in mixed.items():
            self._gradient_row(name, step).sub_(grad)

    def result(self) -> MetaStepResult:
        """Everything, once the walk is back at the initialisation, which all tasks share."""
        for name, p in self.adjoint.items():
            self.grads[name].add_(p.sum(0))
        return MetaStepResult.of(self.measurements, self.grads, self.meta_loss)

    def _gradient_row(self, name: str, step: int) -> Tensor:
        """The gradient of a step's norm row or rate, to be changed in place."""
        grad = self.grads[name]
        return grad[min(step, len(grad) - 1)]
