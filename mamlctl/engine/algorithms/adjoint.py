"""The meta-gradient without an unrolled graph: walk back through the inner steps with the adjoint.

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
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, counts
from mamlctl.engine.derivatives.interface import Derivatives, Gradient
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params

# Inner steps, counted from the last, whose passes are kept for the Hessian-vector products; earlier ones are
# made again, at 3 of 15 units of a step's convolutions. So memory stops growing after these.
KEPT = 5


@dataclass
class _Step:
    """What stays of an inner step until the walk back."""

    fast: Params  # before the step
    gradient: Gradient | None  # of the support loss there; None: to be made again


def adjoint(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: MetaStepRequest,
    *,
    derivatives: Derivatives | None = None,
) -> MetaStepResult:
    """The meta-gradient of `meta_gradient.unrolled`, with memory that does not grow with the steps' graphs.

    `derivatives`: other than the fastest ones for the net.
    """
    steps, weights = ask.inner_steps, ask.msl_weights
    with torch.no_grad():
        derivatives = derivatives or select_derivatives(net, episodes.support_x_TECHW)
        walk = AdjointPass(derivatives, state, episodes, ask.first_order)
        for step in range(steps):
            if ask.measure_all and not (step and counts(weights[step - 1])):
                walk.look(step)
            walk.forward(step, last=step >= steps - KEPT)
        if ask.measure_all and not counts(weights[-1]):
            walk.look(steps)
        for step in range(steps - 1, -1, -1):
            if counts(weights[step]):
                walk.weigh(step, weights[step])
            walk.back(step)
        return walk.measured()


class AdjointPass:
    """Forward through the inner steps and back, all tasks of the episodes at once."""

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, first_order: bool
    ) -> None:
        self.derivatives, self.state, self.first_order = derivatives, state, first_order
        self.support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        self.query = derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE)
        self.query_y_TE, self.tasks = episodes.query_y_TE, len(episodes.query_y_TE)
        self.fast = {name: weight.expand(self.tasks, *weight.shape) for name, weight in state.slow.items()}
        self.p = {name: torch.zeros_like(weight) for name, weight in self.fast.items()}
        self.steps: list[_Step] = []
        self.grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
        self.meta_loss = episodes.support_x_TECHW.new_zeros(())
        self.support_losses: list[Tensor] = []
        self.query_losses: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}
        self.passes: list[NormPass] = []

    def forward(self, step: int, *, last: bool) -> None:
        """One inner step on the support set; what the walk back asks for is kept of the last ones."""
        norm = self._norm(step)
        found = self.derivatives.gradient(self.fast, self.support, norm, keep=last and not self.first_order)
        self.passes.append(norm)
        self.support_losses.append(found.loss_T.mean())
        self.steps.append(_Step(self.fast, found if last or self.first_order else None))
        self.fast = self.state.stepped(self.fast, found.fast, step)

    def weigh(self, step: int, weight: float | Tensor) -> None:
        """Add the query loss after a step, and its gradient by the weights there, to what p holds."""
        norm = self._norm(step)
        found = self.derivatives.gradient(self.fast, self.query, norm)
        self.passes.append(norm)
        share = weight / self.tasks
        self.p = {name: p + found.fast[name] * share for name, p in self.p.items()}
        for name, grad in found.norm.items():
            self._at_row(name, step).add_(grad * share)
        loss = found.loss_T.mean()
        self.meta_loss = self.meta_loss + weight * loss
        self._note(step + 1, loss, found.logits_TEN)

    def look(self, steps: int) -> None:
        """The query loss after some steps, which is only measured."""
        logits_TEN = self.derivatives.logits(self.fast, self.query, self._norm(max(steps - 1, 0)))
        self._note(steps, self.derivatives.net.objective.loss(logits_TEN, self.query_y_TE).mean(), logits_TEN)

    def back(self, step: int) -> None:
        """From p after a step to p before it."""
        taken = self.steps.pop()
        found, self.fast = taken.gradient, taken.fast
        if found is None:
            found = self.derivatives.gradient(self.fast, self.support, self._norm(step), keep=True)
        if self.state.rates_learnt:
            for name in self.state.rates:
                grad = self._at_row(f"{RATE}{name}", step)
                grad.sub_((self.p[name] * found.fast[name]).sum_to_size(grad.shape))
        if self.first_order:
            return
        direction = {
            name: p * self.state.rate(name, step) if name in self.state.rates else torch.zeros_like(p)
            for name, p in self.p.items()
        }
        products, by_norm = self.derivatives.product(found.tape, direction)
        self.p = {name: p - products[name] for name, p in self.p.items()}
        for name, grad in by_norm.items():
            self._at_row(name, step).sub_(grad)

    def measured(self) -> MetaStepResult:
        """Everything, once the walk is back at the initialisation."""
        for name, p in self.p.items():
            self.grads[name].add_(p.sum(0))
        return MetaStepResult(
            self.grads,
            self.meta_loss,
            torch.stack(self.support_losses),
            dict(sorted(self.query_losses.items())),
            dict(sorted(self.scores.items())),
            self.passes,
        )

    def _norm(self, step: int) -> NormPass:
        return NormPass(self.state.norm, self.state.running, step)

    def _at_row(self, name: str, step: int) -> Tensor:
        """The gradient of a step's norm row or rate, to be changed in place."""
        grad = self.grads[name]
        return grad[min(step, len(grad) - 1)]

    def _note(self, steps: int, loss: Tensor, logits_TEN: Tensor) -> None:
        self.query_losses[steps] = loss
        self.scores[steps] = self.derivatives.net.objective.score(logits_TEN, self.query_y_TE).mean()
