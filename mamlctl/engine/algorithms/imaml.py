"""iMAML: the implicit meta-gradient at the end of the inner loop.

Rajeswaran, Finn, Kakade & Levine 2019 (arXiv:1909.04630). The inner loop minimises (equation 3; l is lambda
in the paper, --proximal here)

    w* = argmin_w  L_support(w; f) + l/2 |w - w_0|^2

At the minimum grad L_support(w*; f) + l (w* - w_0) = 0. Differentiating this condition gives, with H the
Hessian of the support loss at w* (the implicit function theorem; lemma 1),

    dw*/dw_0 = (I + H/l)^-1 = l (H + l)^-1        dw*/df = -(H + l)^-1 d/df grad_w L_support

So with v the solution of (H + l) v = grad L_query(w*; f), the meta-gradient of a task is

    with respect to w_0                            l v
    with respect to f and all that is not adapted  dL_query/df - d/df <grad_w L_support, v>

v comes from `cg_steps` steps of conjugate gradient, one Hessian-vector product each, for all tasks at once.
Only the end of the inner loop matters, so memory does not depend on the number of inner steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop, TaskSets
from mamlctl.engine.inner_loop import InnerRule, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Params


@torch.no_grad()
def imaml(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    engine: EngineName,
    proximal: float,
    cg_steps: int,
) -> MetaStepResult:
    """Compute the implicit meta-gradient.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`.
        engine: the --engine setting.
        proximal: l, the strength of the pull towards the slow weights.
        cg_steps: the number of conjugate-gradient steps.

    Returns:
        As in `meta_gradient.Outer`.
    """
    derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
    loop = InnerLoop(TaskSets(derivatives, episodes), state, InnerRule(proximal))
    loop.run(request.inner_steps, measure_all=request.measure_all)
    support = loop.support_gradient(loop.support_pass(0), keep=True)
    query = loop.query_gradient(request.inner_steps)
    # v has no component along tensors that are not adapted.
    zeros = {name: torch.zeros_like(part) for name, part in query.fast.items() if name not in state.rates}

    def shifted_product(direction: Params) -> Params:
        """Multiply H + l by a direction of the adapted tensors."""
        products, _ = support.product(direction | zeros)
        return {name: products[name] + proximal * part for name, part in direction.items()}

    adapted_grads = {name: query.fast[name] for name in state.rates}
    solved = conjugate_gradient(shifted_product, adapted_grads, cg_steps)
    products, mixed = support.product(solved | zeros)
    # Means over tasks: l v for the adapted tensors, dL_query - d<grad L_support, v> for all others.
    grads = {name: proximal * v.mean(0) for name, v in solved.items()}
    grads |= {name: (query.fast[name] - products[name]).mean(0) for name in zeros}
    for name, rows_RC in state.norm.items():
        grads[name] = torch.zeros_like(rows_RC)
        grads[name][0] = (query.norm[name] - mixed[name]) / len(episodes.query_y_TE)
    loss_T = loop.measurements.query_losses_T[request.inner_steps]
    return MetaStepResult.of(loop.measurements, grads, loss_T.mean())


def conjugate_gradient(product: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Solve A x = b for every task by conjugate gradient (Hestenes & Stiefel 1952).

    With r the residual b - A x, d the direction and x = 0, r = d = b at the start, a step is

        s = <r, r> / <d, A d>        x = x + s d        r' = r - s A d        d = r' + <r', r'> / <r, r> d

    A task stops at a residual of 0, or at a direction with <d, A d> <= 0: then A is not positive definite,
    and x solves the system on the directions so far.

    Args:
        product: multiplies A by a vector; each tensor has the leading axis T.
        b: the right-hand sides.
        steps: the number of steps.

    Returns:
        x, in the shapes of `b`.
    """
    x = {name: torch.zeros_like(part) for name, part in b.items()}
    residual, direction = dict(b), dict(b)
    squared_T = _dots(residual, residual)
    for _ in range(steps):
        along = product(direction)
        curvature_T = _dots(direction, along)
        good_T = (curvature_T > 0) & (squared_T > 0)
        length_T = torch.where(good_T, squared_T / curvature_T, 0)
        x = _plus(x, length_T, direction)
        residual = _plus(residual, -length_T, along)
        new_T = _dots(residual, residual)
        # A task that has stopped gets a direction of 0, so its x stays the same.
        turn_T = torch.where(good_T, new_T / squared_T, 0)
        direction = _plus(
            {name: part * _like(good_T, part) for name, part in residual.items()}, turn_T, direction
        )
        squared_T = torch.where(good_T, new_T, 0)
    return x


def _dots(one: Params, two: Params) -> Tensor:
    """Compute each task's inner product over all its tensors -> _T."""
    return torch.stack([(part * two[name]).flatten(1).sum(1) for name, part in one.items()]).sum(0)


def _plus(one: Params, times_T: Tensor, two: Params) -> Params:
    return {name: part + _like(times_T, part) * two[name] for name, part in one.items()}


def _like(values_T: Tensor, part: Tensor) -> Tensor:
    return values_T.view(-1, *[1] * (part.dim() - 1))
