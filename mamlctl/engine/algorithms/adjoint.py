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
from mamlctl.engine.algorithms.meta_gradient import (
    MetaStepRequest,
    MetaStepResult,
    enters_meta_loss,
    means,
)
from mamlctl.engine.derivatives.interface import Derivatives, Gradient
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop, TaskSets
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.flat import Flat, flattened

# The number of last inner steps whose support passes are kept for the Hessian-vector products. The passes of
# earlier steps are computed again, which is 3 of the 15 units of convolution work of such a step. So each
# further step needs memory for its fast weights only.
KEPT = 5


@dataclass
class _Point:
    """What is kept of an inner step for the way back."""

    weights: Flat  # w_k, the fast weights before the step
    gradient: Gradient | None  # of the support loss at w_k; None if it is to be computed again
    gradient_P: Tensor | None  # its gradient of the weights, in one buffer


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
    """Forward through the inner steps and back, for all tasks of the episodes at once.

    The fast weights, their gradients and the adjoint are buffers of P values, so that an update is a single
    operation. The gradients of all norm rows are one tensor too.
    """

    fast: Flat  # w_k

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, *, first_order: bool
    ) -> None:
        """Start at the slow weights, with an adjoint of 0; arguments as in `InnerLoop`."""
        super().__init__(TaskSets(derivatives, episodes), state)
        self.first_order, self.tasks = first_order, len(episodes.query_y_TE)
        self.fast = Flat.of(self.fast)
        self.adjoint_P = torch.zeros_like(self.fast.buffer)  # p
        self.rates_P: dict[int, Tensor] = {}  # a_k for every weight
        # Gradients of the norm rows and of one rate per tensor: a row per inner step, a column per value.
        self.norm_RP = _rows(state.norm, self.adjoint_P)
        self.rates_RL = _rows(state.rates, self.adjoint_P) if state.rates_learnt else None
        self.shares: list[tuple[float | Tensor, int]] = []  # v_k and the inner steps before its query loss
        self._points: list[_Point] = []

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """Take inner step `step`; `keep` its passes for the way back."""
        before, norm = self.fast, self.support_pass(step)
        gradient = self.support_gradient(norm, keep=keep and not self.first_order)
        self.measurements.add_support(gradient.loss_T, norm)
        gradient_P = before.ordered(gradient.fast)
        self.fast = before.like(before.buffer - self._rates(step) * gradient_P)
        # First order needs no products, and the gradient without its tape is small enough to keep.
        kept = keep or self.first_order
        self._points.append(_Point(before, gradient if kept else None, gradient_P if kept else None))
        return gradient

    def add_query_gradient(self, step: int, weight: float | Tensor) -> None:
        """Add v_k L_query(w_{k+1}; f_k), k = `step`, to the meta-loss, and its gradients to p and dL/df_k."""
        query = self.query_gradient(step + 1)
        # The mean over tasks: every task's loss counts 1/T.
        share = weight / self.tasks
        self.adjoint_P = self.adjoint_P + self.fast.ordered(query.fast) * share
        if self.norm_RP is not None:
            self._row(self.norm_RP, step).add_(self._norm_buffer(query.norm) * share)
        self.shares.append((weight, step + 1))

    def step_back(self, step: int) -> None:
        """Go from p_{k+1} to p_k, k = `step`, and add to dL/da_k and dL/df_k."""
        point = self._points.pop()
        self.fast = point.weights
        support, gradient_P = point.gradient, point.gradient_P
        if support is None or gradient_P is None:
            support = self.support_gradient(self.support_pass(step), keep=True)
            gradient_P = self.fast.ordered(support.fast)
        if self.rates_RL is not None:
            # dL/da_k = -<p_{k+1}, g_k>: summed over tasks, and over a tensor with LSLR but not with Meta-SGD.
            terms = self.fast.like(self.adjoint_P * gradient_P)
            sums = [
                terms[name].sum_to_size(rates.shape[1:]).flatten() for name, rates in self.state.rates.items()
            ]
            self._row(self.rates_RL, step).sub_(torch.cat(sums))
        if self.first_order:
            return
        # The direction a_k p_{k+1}; tensors that are not adapted have a rate of 0.
        direction = self.fast.like(self.adjoint_P * self._rates(step))
        products, mixed = support.product(direction)
        self.adjoint_P = self.adjoint_P - self.fast.ordered(products)
        if self.norm_RP is not None:
            self._row(self.norm_RP, step).sub_(self._norm_buffer(mixed))

    def result(self) -> MetaStepResult:
        """Return the meta-gradients and measurements, after the last step back."""
        # All tasks start from the same slow weights, so dL/dw_0 is the sum of p_0 over tasks.
        grads = {name: p.sum(0) for name, p in self.fast.like(self.adjoint_P).items()}
        grads |= _by_name(self.norm_RP, self.state.norm)
        rates = _by_name(self.rates_RL, self.state.rates)
        grads |= {f"{RATE}{name}": grad for name, grad in rates.items()}
        meta_loss = self.adjoint_P.new_zeros(())
        losses = means(self.measurements.query_losses_T)
        for weight, steps in self.shares:
            meta_loss = meta_loss + weight * losses[steps]
        return MetaStepResult.of(self.measurements, grads, meta_loss)

    def _rates(self, step: int) -> Tensor:
        """Return a_k, k = `step`, for every fast weight; 0 for the tensors that are not adapted."""
        if step not in self.rates_P:
            zero = self.adjoint_P.new_zeros(())
            rates = []
            for name, shape in self.fast.shapes.items():
                rate = self.state.rate(name, step) if name in self.state.rates else zero
                # A rate of a whole tensor is repeated as a view; one per weight is repeated for each task.
                rates.append(rate.expand(shape.numel()) if rate.dim() == 0 else flattened(rate.expand(shape)))
            self.rates_P[step] = torch.cat(rates)
        return self.rates_P[step]

    def _norm_buffer(self, grads: Params) -> Tensor:
        """Return the gradients of a norm row in one buffer, in the order of the state."""
        if isinstance(grads, Flat) and list(grads) == list(self.state.norm):
            return grads.buffer
        return torch.cat([grads[name] for name in self.state.norm])

    def _row(self, rows: Tensor, step: int) -> Tensor:
        """Return the row of a step as a view, to be updated in place; later steps share the last row."""
        return rows[min(step, len(rows) - 1)]


def _rows(params: Params, like: Tensor) -> Tensor | None:
    """Return zeros for the gradients of tensors with the same number of rows; None without tensors."""
    if not params:
        return None
    rows = len(next(iter(params.values())))
    return like.new_zeros(rows, sum(tensor[0].numel() for tensor in params.values()))


def _by_name(rows: Tensor | None, params: Params) -> Params:
    """Divide the columns of `_rows` into tensors of the shapes of `params`."""
    if rows is None:
        return {}
    parts = torch.split(rows, [tensor[0].numel() for tensor in params.values()], dim=1)
    named = {}
    for (name, tensor), part in zip(params.items(), parts, strict=True):
        named[name] = part.reshape(tensor.shape).contiguous()
    return named
