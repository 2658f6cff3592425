"""Derivatives along the inner loop of policies, by products with its Jacobian instead of an unrolled graph.

With w_k the fast weights, a_k the inner rates, g_k the policy gradient and H_k the second derivative of the
loss at w_k, an inner step w_{k+1} = w_k - a_k g_k changes a small change t_k of the weights, and da_k of the
rates, to

    t_{k+1} = t_k - a_k H_k t_k - da_k g_k

The transposed product takes derivatives u_k with respect to w_k back to the slow weights:

    r_I = u_I        r_k = u_k + r_{k+1} - H_k a_k r_{k+1}        d/da_k = -<g_k, r_{k+1}>

First order leaves out H_k. The second derivative of a divergence of policies at the policies themselves, F_k,
has no term with the second derivative of w_k, so that of the mean divergence is J^T F J, with J the Jacobian.
All products are computed task by task, so that the tensors of a task stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mamlctl.engine.inner_loop import RATE, MetaState, row_of
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.reinforcement.policy_gradient import PolicyPoint


class AdaptedPolicies:
    """The policies along an inner loop that has been run, and derivatives of means over them."""

    def __init__(
        self,
        state: MetaState,
        points: Sequence[PolicyPoint],
        weights: Sequence[float],
        *,
        first_order: bool,
    ) -> None:
        """Prepare the products.

        Args:
            state: slow weights and rates.
            points: the policies before the first inner step and after each one, with their experience.
            weights: of the points in means over them.
            first_order: leave out the second derivatives of the inner steps.
        """
        self.state, self.first_order, self.weights = state.frozen(), first_order, weights
        self.learnable = {name: part.detach() for name, part in state.learnable().items()}
        self._loops = list(zip(*(point.tasks for point in points), strict=True))

    @torch.no_grad()
    def gradient(self) -> Params:
        """The gradient of the weighted mean loss with respect to the learnable tensors."""

        def gradients(task: int) -> dict[int, Params]:
            return {step: self._loops[task][step].gradient for step in self._weighted()}

        return self._mean(gradients, once=True)

    @torch.no_grad()
    def divergence_product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative of the weighted mean divergence, times a tangent of the learnable tensors."""

        def products(task: int) -> dict[int, Params]:
            tangents = self._push(task, tangent)
            loop = self._loops[task]
            return {step: loop[step].divergence_product(tangents[step]) for step in self._weighted()}

        return self._mean(products)

    def _weighted(self) -> list[int]:
        return [step for step, weight in enumerate(self.weights) if weight]

    def _mean(self, cotangents: Callable[[int], Mapping[int, Params]], *, once: bool = False) -> Params:
        """The weighted mean over tasks of derivatives for fast weights, pulled to the learnable tensors."""
        grads = {name: torch.zeros_like(part) for name, part in (self.state.slow | self.learnable).items()}
        for task in range(len(self._loops)):
            self._pull(task, cotangents(task), grads, once=once)
        return {name: grads[name] / len(self._loops) for name in self.learnable}

    def _push(self, task: int, tangent: Mapping[str, Tensor]) -> list[Params]:
        """The tangents t_k of the fast weights of a task before the first inner step and after each one."""
        now = {name: tangent.get(name, torch.zeros_like(part)) for name, part in self.state.slow.items()}
        tangents = [now]
        for step, at in enumerate(self._loops[task][:-1]):
            second = {} if self.first_order else at.loss_product(now)
            now = dict(now)
            for name in self.state.rates:
                if second:
                    now[name] = now[name] - self.state.rate(name, step) * second[name]
                if f"{RATE}{name}" in tangent:
                    row = row_of(tangent[f"{RATE}{name}"], step)
                    now[name] = now[name] - row * at.gradient[name]
            tangents.append(now)
        return tangents

    def _pull(self, task: int, cotangents: Mapping[int, Params], grads: Params, *, once: bool) -> None:
        """Add the derivatives with respect to slow weights and rates, from those u_k for the fast weights."""
        loop = self._loops[task]
        back: Params = {name: torch.zeros_like(part) for name, part in self.state.slow.items()}
        for step in range(len(loop) - 1, -1, -1):
            if step < len(loop) - 1:
                scaled = {name: torch.zeros_like(part) for name, part in back.items()}
                for name in self.state.rates:
                    scaled[name] = self.state.rate(name, step) * back[name]
                    if f"{RATE}{name}" in grads:
                        row = row_of(grads[f"{RATE}{name}"], step)
                        row -= (loop[step].gradient[name] * back[name]).sum_to_size(row.shape)
                if not self.first_order:
                    second = loop[step].loss_product(scaled, once=once)
                    back = {name: part - second[name] for name, part in back.items()}
            for name, part in cotangents.get(step, {}).items():
                back[name] = back[name] + self.weights[step] * part
        for name, part in back.items():
            grads[name] += part
