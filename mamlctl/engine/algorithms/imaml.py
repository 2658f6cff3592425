"""iMAML: the implicit gradient at the inner loop's end.

Rajeswaran, Finn, Kakade & Levine 2019 (arXiv:1909.04630). The inner loop minimises, by equation 3,

    support loss + proximal / 2 |w - w0|^2

At the minimum the implicit function theorem gives, with H the support loss's Hessian there and v solving
(H + proximal) v = gradient of the query loss (lemma 1),

    by the slow weights   proximal v
    by the norm and all that is not adapted   the query's own gradient - (mixed second derivative) v

v comes from `cg_steps` of conjugate gradient, a Hessian-vector product each, for all tasks at once. Memory
does not depend on the number of inner steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop
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
    """The meta-gradient at the inner loop's end alone.

    `proximal`: the strength of the pull to the initialisation (lambda in the paper); `cg_steps`: of conjugate
    gradient.
    """
    derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
    loop = InnerLoop(derivatives, state, episodes, InnerRule(proximal))
    loop.run(request.inner_steps, measure_all=request.measure_all)
    support = loop.support_gradient(state.norm_pass(0), keep=True)
    query = loop.query_gradient(request.inner_steps)
    # Of what is not adapted the direction is 0.
    still = {name: torch.zeros_like(part) for name, part in query.fast.items() if name not in state.rates}

    def pulled_product(direction: Params) -> Params:
        """(H + proximal) times a direction of what is adapted."""
        products, _ = support.product(direction | still)
        return {name: products[name] + proximal * part for name, part in direction.items()}

    adapted_grads = {name: query.fast[name] for name in state.rates}
    solved = conjugate_gradient(pulled_product, adapted_grads, cg_steps)
    products, mixed = support.product(solved | still)
    grads = {name: proximal * v.mean(0) for name, v in solved.items()}
    grads |= {name: (query.fast[name] - products[name]).mean(0) for name in still}
    for name, rows_RC in state.norm.items():
        grads[name] = torch.zeros_like(rows_RC)
        grads[name][0] = (query.norm[name] - mixed[name]) / len(episodes.query_y_TE)
    return MetaStepResult.of(loop.measurements, grads, loop.measurements.query_losses[request.inner_steps])


def conjugate_gradient(product: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Solve A x = b for every task, A being given by its products (Hestenes & Stiefel 1952).

    A task stops where it finds no more curvature or nothing left to do; of indefinite A the solution is that
    on the directions found so far.
    """
    x = {name: torch.zeros_like(part) for name, part in b.items()}
    residual, direction = dict(b), dict(b)
    squared_T = _dots(residual, residual)
    for _ in range(steps):
        # The step along the direction that leaves no residual along it.
        along = product(direction)
        curvature_T = _dots(direction, along)
        good_T = (curvature_T > 0) & (squared_T > 0)
        length_T = torch.where(good_T, squared_T / curvature_T, 0)
        x = _plus(x, length_T, direction)
        residual = _plus(residual, -length_T, along)
        new_T = _dots(residual, residual)
        # A task that stops keeps its residual, and moves no more: its direction becomes 0.
        turn_T = torch.where(good_T, new_T / squared_T, 0)
        direction = _plus(
            {name: part * _like(good_T, part) for name, part in residual.items()}, turn_T, direction
        )
        squared_T = torch.where(good_T, new_T, 0)
    return x


def _dots(one: Params, two: Params) -> Tensor:
    """Inner products over all of a task's tensors -> _T."""
    return torch.stack([(part * two[name]).flatten(1).sum(1) for name, part in one.items()]).sum(0)


def _plus(one: Params, times_T: Tensor, two: Params) -> Params:
    return {name: part + _like(times_T, part) * two[name] for name, part in one.items()}


def _like(values_T: Tensor, part: Tensor) -> Tensor:
    return values_T.view(-1, *[1] * (part.dim() - 1))
