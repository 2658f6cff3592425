"""Derivatives along the inner loop of policies, by products with its Jacobian instead of an unrolled graph.

With w_k the fast weights, a_k the inner rates, g_k the policy gradient and H_k the second derivative of the
loss at w_k, an inner step w_{k+1} = w_k - a_k g_k changes a small change t_k of the weights, and da_k of the
rates, to

    t_{k+1} = t_k - a_k H_k t_k - da_k g_k

The transposed product takes derivatives u_k with respect to w_k back to the slow weights:

    r_I = u_I        r_k = u_k + r_{k+1} - H_k a_k r_{k+1}        d/da_k = -<g_k, r_{k+1}>

First order leaves out H_k. The second derivative of a divergence of policies at the policies themselves, F_k,
has no term with the second derivative of w_k, so that of the mean divergence is J^T F J, with J the Jacobian.
F_k has first derivatives only, too: with M the metric of the distributions of actions and G their derivatives
with respect to w_k, it is G^T M G (Amari 1998; Martens 2020, arXiv:1412.1193, section 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlctl.engine.inner_loop import RATE, MetaState, row_of
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.mlp import GaussianPolicy
from mamlctl.engine.reinforcement.gaussian import Gaussian
from mamlctl.engine.reinforcement.policy_gradient import PolicyPoint


@dataclass(frozen=True)
class _Slope:
    """A gradient at the fast weights of all tasks, for products with the second derivative."""

    leaves: Params
    grads: Params

    @classmethod
    def of(cls, leaves: Params, values_T: Tensor, *, twice: bool = True) -> _Slope:
        """The gradient of the values of all tasks; without `twice` it has no products."""
        inputs = list(leaves.values())
        grads = torch.autograd.grad(values_T.sum(), inputs, create_graph=twice, retain_graph=True)
        return cls(leaves, dict(zip(leaves, grads, strict=True)))

    def product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative times a tangent, whose missing tensors are 0."""
        along = torch.stack([(self.grads[name] * part).sum() for name, part in tangent.items()]).sum()
        inputs = list(self.leaves.values())
        parts = torch.autograd.grad(along, inputs, retain_graph=True, materialize_grads=True)
        return dict(zip(self.leaves, parts, strict=True))

    def scaled(self, factor: float) -> Params:
        """The gradient times a number, without a graph."""
        return {name: factor * grad.detach() for name, grad in self.grads.items()}


@dataclass(frozen=True)
class _Fisher:
    """The second derivative of a mean divergence of Gaussian policies from themselves, for products.

    The divergence has the second derivative w / s^2 with respect to a mean and 2 w with respect to a log s,
    where s is the deviation and w the weight of a state. G t is the derivative of <G^T c, t> with respect to
    c, which takes as many multiplications as G^T c.
    """

    leaves: Params
    mean_TEA: Tensor
    log_TA: Tensor
    metrics: tuple[Tensor, Tensor]  # M for both
    zeros: tuple[Tensor, Tensor]  # c
    pulled: tuple[Tensor, ...]  # G^T c

    @classmethod
    def of(cls, leaves: Params, gaussian: Gaussian, weight_TE: Tensor) -> _Fisher:
        """Prepare the products.

        Args:
            leaves: the fast weights of all tasks.
            gaussian: the distributions of the policies with these weights.
            weight_TE: of each state in the mean.
        """
        outputs = (gaussian.mean_TEA, gaussian.log_deviation_TA)
        metric_TEA = weight_TE.unsqueeze(-1) * (-2 * outputs[1].detach()).exp().unsqueeze(1)
        metric_TA = (2 * weight_TE.sum(1, keepdim=True)).expand_as(outputs[1])
        zeros = (
            torch.zeros_like(outputs[0], requires_grad=True),
            torch.zeros_like(outputs[1], requires_grad=True),
        )
        pulled = torch.autograd.grad(outputs, list(leaves.values()), zeros, create_graph=True)
        return cls(leaves, *outputs, (metric_TEA, metric_TA), zeros, pulled)

    def product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative times a tangent."""
        along = [tangent[name] for name in self.leaves]
        pushed = torch.autograd.grad(self.pulled, self.zeros, along, retain_graph=True)
        scaled = [metric * part for metric, part in zip(self.metrics, pushed, strict=True)]
        outputs, inputs = (self.mean_TEA, self.log_TA), list(self.leaves.values())
        parts = torch.autograd.grad(outputs, inputs, scaled, retain_graph=True)
        return dict(zip(self.leaves, parts, strict=True))


class AdaptedPolicies:
    """The policies along an inner loop that has been run, and derivatives of means over them."""

    def __init__(
        self,
        policy: GaussianPolicy,
        state: MetaState,
        points: Sequence[PolicyPoint],
        weights: Sequence[float],
        *,
        first_order: bool,
    ) -> None:
        """Prepare the products.

        Args:
            policy: the policy.
            state: slow weights and rates.
            points: the policies before the first inner step and after each one, with their experience.
            weights: of the points in means over them.
            first_order: leave out the second derivatives of the inner steps.
        """
        self.state, self.first_order = state.frozen(), first_order
        self.learnable = {name: part.detach() for name, part in state.learnable().items()}
        self.tasks, last = len(next(iter(points[0].fast.values()))), len(points) - 1
        self._inner: list[_Slope] = []
        self._losses: dict[int, Params] = {}
        self._divergences: dict[int, _Fisher] = {}
        with torch.enable_grad():
            for step, (point, weight) in enumerate(zip(points, weights, strict=True)):
                leaves = {name: part.detach().requires_grad_() for name, part in point.fast.items()}
                loss_T, gaussian = point.experience.surrogate(policy, leaves)
                slope = _Slope.of(leaves, loss_T, twice=step < last)
                if step < last:
                    self._inner.append(slope)
                if weight:
                    self._losses[step] = slope.scaled(weight / self.tasks)
                    alive_TE = point.experience.trained.alive_TEH.flatten(1)
                    weight_TE = weight / self.tasks * alive_TE / alive_TE.sum(1, keepdim=True)
                    self._divergences[step] = _Fisher.of(leaves, gaussian, weight_TE)

    def gradient(self) -> Params:
        """The gradient of the weighted mean loss with respect to the learnable tensors."""
        return self._pull(self._losses)

    def divergence_product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative of the weighted mean divergence, times a tangent of the learnable tensors."""
        tangents = self._push(tangent)
        return self._pull({step: slope.product(tangents[step]) for step, slope in self._divergences.items()})

    def _push(self, tangent: Mapping[str, Tensor]) -> list[Params]:
        """The tangents t_k of the fast weights before the first inner step and after each one."""
        slow = {name: tangent.get(name, torch.zeros_like(part)) for name, part in self.state.slow.items()}
        now = {name: part.expand(self.tasks, *part.shape) for name, part in slow.items()}
        tangents = [now]
        for step, slope in enumerate(self._inner):
            second = {} if self.first_order else slope.product(now)
            now = dict(now)
            for name in self.state.rates:
                if second:
                    now[name] = now[name] - self.state.rate(name, step) * second[name]
                if f"{RATE}{name}" in tangent:
                    row = row_of(tangent[f"{RATE}{name}"], step)
                    now[name] = now[name] - row * slope.grads[name].detach()
            tangents.append(now)
        return tangents

    def _pull(self, cotangents: Mapping[int, Params]) -> Params:
        """The derivative with respect to the learnable tensors, from those for the fast weights u_k."""
        every = self.state.slow | self.learnable
        grads = {name: torch.zeros_like(part) for name, part in every.items()}
        zeros = {name: part.new_zeros(self.tasks, *part.shape) for name, part in self.state.slow.items()}
        back = dict(cotangents.get(len(self._inner), zeros))
        for step in range(len(self._inner) - 1, -1, -1):
            slope, scaled = self._inner[step], {}
            for name in self.state.rates:
                scaled[name] = self.state.rate(name, step) * back[name]
                if f"{RATE}{name}" in grads:
                    row = row_of(grads[f"{RATE}{name}"], step)
                    row -= (slope.grads[name].detach() * back[name]).sum_to_size((1, *row.shape))[0]
            second = {} if self.first_order else slope.product(scaled)
            own = cotangents.get(step, zeros)
            back = {name: back[name] + own[name] - second.get(name, 0.0) for name in back}
        for name, part in back.items():
            grads[name] += part.sum(0)
        return {name: grads[name] for name in self.learnable}
