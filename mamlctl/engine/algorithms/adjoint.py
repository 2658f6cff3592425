"""MAML's meta-gradient by the adjoint method, without an unrolled graph.

The inner loop and the meta-loss of one task are (arXiv:1703.03400, section 2.2; the weights v_k of the
multi-step loss are those of arXiv:1810.09502, section 4)

    g_k = grad_w L_support(w_k; f_k)        w_{k+1} = w_k - a_k g_k        k = 0 .. I-1
    L   = sum_k v_k L_query(w_{k+1}; f_k)

with fast weights w_k, inner rates a_k and batch-norm rows f_k. The adjoint p_k = dL/dw_k is the gradient of
the meta-loss with respect to the fast weights w_k, through their own query loss and through all later steps.
Differentiating w_{k+1} with respect to w_k gives the identity minus a_k H_k, with H_k the Hessian of the
support loss at w_k. By the chain rule, backwards from p_I = v_{I-1} grad L_query(w_I; f_{I-1}):

    dL/da_k  = -<p_{k+1}, g_k>        summed over the weights that share the rate
    p_k      = p_{k+1} - H_k (a_k p_{k+1}) + v_{k-1} grad L_query(w_k; f_{k-1})        no query term for k = 0
    dL/df_k += v_k dL_query/df (w_{k+1}; f_k) - d/df <grad_w L_support(w_k; f_k), a_k p_{k+1}>

and the mean of p_0 over tasks is the meta-gradient of the slow weights (the code includes the factor 1/T in
v_k). First order takes H_k and the last term as 0.

A step costs one Hessian-vector product, whose second result is the mixed derivative in the last line. Double
backward keeps the graphs of all steps, so its memory grows with their number; here only the fast weights w_k
are kept, and the passes of the last KEPT steps. Query gradients are computed on the way back.
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

# The number of last inner steps whose support passes are kept for the Hessian-vector products. The passes of
# earlier steps are computed again, which is 3 of the 15 units of convolution work of such a step. So each
# further step needs memory for its fast weights only.
KEPT = 5


@dataclass
class _Point:
    """What is kept of an inner step for the way back."""

    fast: Params  # w_k, the fast weights before the step
    gradient: Gradient | None  # of the support loss at w_k; None if it is to be computed again


def adjoint(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    derivatives: Derivatives | None = None,
) -> MetaStepResult:
    """Compute the meta-gradient of `meta_gradient.unrolled` by the adjoint method.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`.
        derivatives: the implementation to use instead of the fastest one.

    Returns:
        As in `meta_gradient.Outer`.
    """
    steps, weights = request.inner_steps, request.msl_weights
    with torch.no_grad():
        derivatives = derivatives or select_derivatives(net, episodes.support_x_TECHW)
        walk = AdjointPass(derivatives, state, episodes, first_order=request.first_order)
        for step in range(steps):
            # The query losses that enter the meta-loss are measured on the way back, with their gradients.
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
    """Forward through the inner steps and back, for all tasks of the episodes at once."""

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, *, first_order: bool
    ) -> None:
        """Start at the slow weights, with an adjoint of 0; arguments as in `InnerLoop`."""
        super().__init__(derivatives, state, episodes)
        self.first_order, self.tasks = first_order, len(episodes.query_y_TE)
        self.adjoint = {name: torch.zeros_like(weight) for name, weight in self.fast.items()}  # p
        self.grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
        self.meta_loss = episodes.support_x_TECHW.new_zeros(())
        self._points: list[_Point] = []

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """Take inner step `step`; `keep` its passes for the way back."""
        before = self.fast
        gradient = super().inner_step(step, keep=keep and not self.first_order)
        # First order needs no products, and the gradient without its tape is small enough to keep.
        self._points.append(_Point(before, gradient if keep or self.first_order else None))
        return gradient

    def add_query_gradient(self, step: int, weight: float | Tensor) -> None:
        """Add v_k L_query(w_{k+1}; f_k), k = `step`, to the meta-loss, and its gradients to p and dL/df_k."""
        query = self.query_gradient(step + 1)
        # The mean over tasks: every task's loss counts 1/T.
        share = weight / self.tasks
        self.adjoint = {name: p + query.fast[name] * share for name, p in self.adjoint.items()}
        for name, grad in query.norm.items():
            self._gradient_row(name, step).add_(grad * share)
        self.meta_loss = self.meta_loss + weight * self.measurements.query_losses[step + 1]

    def step_back(self, step: int) -> None:
        """Go from p_{k+1} to p_k, k = `step`, and add to dL/da_k and dL/df_k."""
        point = self._points.pop()
        self.fast, support = point.fast, point.gradient
        if support is None:
            support = self.support_gradient(self.state.norm_pass(step), keep=True)
        if self.state.rates_learnt:
            # dL/da_k = -<p_{k+1}, g_k>: summed over tasks, and over a tensor with LSLR but not with Meta-SGD.
            for name in self.state.rates:
                grad = self._gradient_row(f"{RATE}{name}", step)
                grad.sub_((self.adjoint[name] * support.fast[name]).sum_to_size(grad.shape))
        if self.first_order:
            return
        # The direction a_k p_{k+1}; tensors that are not adapted have no rate, so theirs is 0.
        direction = {
            name: p * self.state.rate(name, step) if name in self.state.rates else torch.zeros_like(p)
            for name, p in self.adjoint.items()
        }
        products, mixed = support.product(direction)
        self.adjoint = {name: p - products[name] for name, p in self.adjoint.items()}
        for name, grad in mixed.items():
            self._gradient_row(name, step).sub_(grad)

    def result(self) -> MetaStepResult:
        """Return the meta-gradients and measurements, after the last step back."""
        # All tasks start from the same slow weights, so dL/dw_0 is the sum of p_0 over tasks.
        for name, p in self.adjoint.items():
            self.grads[name].add_(p.sum(0))
        return MetaStepResult.of(self.measurements, self.grads, self.meta_loss)

    def _gradient_row(self, name: str, step: int) -> Tensor:
        """Return the gradient of a step's norm row or rate as a view, to be updated in place."""
        grad = self.grads[name]
        return grad[min(step, len(grad) - 1)]
