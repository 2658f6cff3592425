"""Meta-gradients of the algorithms that do not unroll the whole network's inner loop.

Each is an `outer.Outer`; what else they take, `algorithms.py` binds from the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamlctl.data.episodes import Episodes
from mamlctl.engine.derivatives import Derivatives, Gradient
from mamlctl.engine.fast import derivatives_of
from mamlctl.engine.inner import AdamSteps, MetaState, Stepper, pulled
from mamlctl.engine.nets import HEAD, HeadNet, Net
from mamlctl.engine.norms import NormPass, Params
from mamlctl.engine.outer import Ask, Measured, unroll
from mamlctl.engine.predict import body_of, class_distances, expanded, head_state, mini_batch, prototypes


def head_only(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
    *,
    engine: str,
) -> Measured:
    """ANIL (Raghu et al. 2020, arXiv:1909.09157): the inner loop changes the head alone.

    So the body is passed once forward and once backward a set, and what is unrolled is a linear layer.
    Arguments are those of `outer.unrolled`.
    """
    body = _Bodies(net, state, episodes, engine)
    with torch.enable_grad():
        learnt = {
            name: tensor for name, tensor in state.learnable().items() if name in HEAD or "rate." in name
        }
        found = unroll(
            HeadNet(net.outputs, net.objective),
            head_state(state),
            body.as_episodes(),
            ask,
        )
        wanted = [*learnt.values(), *body.features]
        grads = torch.autograd.grad(found.meta_loss, wanted, materialize_grads=True)
    found.passes = body.passes  # the head has no norm
    return found.measured(body.back(state, grads[len(learnt) :]) | dict(zip(learnt, grads, strict=False)))


def prototypical(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
    *,
    engine: str,
) -> Measured:
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175): no inner loop, one ordinary gradient."""
    body = _Bodies(net, state, episodes, engine)
    with torch.enable_grad():
        support_TEF, query_TEF = body.features
        logits_TEN = -class_distances(query_TEF, prototypes(support_TEF, episodes.support_y_TE, net.outputs))
        loss = net.objective.loss(logits_TEN, episodes.query_y_TE).mean()
        grads = torch.autograd.grad(loss, body.features)
    score = net.objective.score(logits_TEN.detach(), episodes.query_y_TE).mean()
    return _without_steps(body.back(state, grads), loss.detach(), score, body.passes)


class _Bodies:
    """The features of both sets of every task, and the way back from their gradients."""

    def __init__(self, net: Net, state: MetaState, episodes: Episodes, engine: str) -> None:
        self.derivatives = derivatives_of(net, episodes.support_x_TECHW, engine)
        self.episodes, self.tasks = episodes, len(episodes.support_y_TE)
        self.passes: list[NormPass] = []
        self.tapes = []
        self.features: list[Tensor] = []
        with torch.no_grad():
            slow = expanded(body_of(state.slow), self.tasks)
            for x_TECHW, y_TE in (
                (episodes.support_x_TECHW, episodes.support_y_TE),
                (episodes.query_x_TECHW, episodes.query_y_TE),
            ):
                norm = NormPass(state.norm, state.running, 0)
                f_TEF, tape = self.derivatives.features(slow, self.derivatives.prepare(x_TECHW, y_TE), norm)
                self.features.append(f_TEF.requires_grad_())
                self.tapes.append(tape)
                self.passes.append(norm)

    def as_episodes(self) -> Episodes:
        """The tasks with features for images."""
        support, query = self.features
        return Episodes(support, self.episodes.support_y_TE, query, self.episodes.query_y_TE)

    def back(self, state: MetaState, by_features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of the body's weights and the norm, summed over tasks and sets."""
        grads = {
            name: torch.zeros_like(weight) for name, weight in (body_of(state.slow) | state.norm).items()
        }
        with torch.no_grad():
            for tape, g_TEF in zip(self.tapes, by_features, strict=True):
                by_body, by_norm = self.derivatives.back_through(tape, g_TEF)
                for name, grad in by_body.items():
                    grads[name] += grad.sum(0)
                for name, grad in by_norm.items():
                    grads[name][0] += grad
        return {name: grad.detach() for name, grad in grads.items()}


@torch.no_grad()
def supervised(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
    *,
    engine: str,
) -> Measured:
    """Pre-training: one network on all classes (or curves) at once, each meta-batch one batch of examples."""
    x_1MCHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], 1).flatten(0, 1).unsqueeze(0)
    y_TE = torch.cat([episodes.support_y_TE, episodes.query_y_TE], 1)
    if episodes.class_TN is not None:
        y_TE = episodes.class_TN.gather(1, y_TE)
    y_1M = y_TE.reshape(1, -1)
    derivatives = derivatives_of(net, x_1MCHW, engine)
    norm = NormPass(state.norm, state.running, 0)
    found = derivatives.gradient(expanded(state.slow, 1), derivatives.prepare(x_1MCHW, y_1M), norm)
    score = net.objective.score(found.logits_TEN, y_1M).mean()
    grads = {name: grad[0] for name, grad in found.fast.items()}
    grads |= {name: grad.unsqueeze(0) for name, grad in found.norm.items()}
    return _without_steps(grads, found.loss_T.mean(), score, [norm])


@torch.no_grad()
def untrained(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
) -> Measured:
    """Nothing is learnt: the loss of the random start, and gradients of 0."""
    norm = NormPass(state.norm, state.running, 0)
    tasks = len(episodes.query_y_TE)
    outputs_TEN = net(expanded(state.slow, tasks), episodes.query_x_TECHW, norm)
    loss = net.objective.loss(outputs_TEN, episodes.query_y_TE).mean()
    score = net.objective.score(outputs_TEN, episodes.query_y_TE).mean()
    grads = {name: torch.zeros_like(tensor) for name, tensor in state.learnable().items()}
    return _without_steps(grads, loss, score, [norm])


def _without_steps(grads: dict[str, Tensor], loss: Tensor, score: Tensor, passes: list[NormPass]) -> Measured:
    """Of an algorithm that trains without an inner loop: a loss after 0 steps."""
    return Measured(grads, loss, loss.new_zeros(0), {0: loss}, {0: score}, passes)


@torch.no_grad()
def interpolated(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
    *,
    engine: str,
    inner_optimizer: str,
) -> Measured:
    """Reptile (Nichol et al. 2018, arXiv:1803.02999): the way back from the tasks' adapted weights.

    So that an outer step of SGD with rate e moves the slow weights by e towards their mean. The query set is
    only looked at.
    """
    derivatives = derivatives_of(net, episodes.support_x_TECHW, engine)
    tasks = len(episodes.support_y_TE)
    adam = AdamSteps(state, tasks) if inner_optimizer == "adam" else None
    inner = _InnerLoop(derivatives, state, episodes, adam or state.stepped)
    for step in range(ask.inner_steps):
        if ask.measure_all:
            inner.look(step)
        inner.step(step)
    inner.look(ask.inner_steps)
    grads = {name: weight - inner.fast[name].mean(0) for name, weight in state.slow.items()}
    return inner.measured(grads, {} if adam is None else adam.moments())


@torch.no_grad()
def implicit(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    ask: Ask,
    *,
    engine: str,
    proximal: float,
    cg_steps: int,
) -> Measured:
    """iMAML (Rajeswaran et al. 2019, arXiv:1909.04630): the meta-gradient at the inner loop's end alone.

    At a minimum of support loss + proximal / 2 |w - w0|^2 the implicit function theorem gives, with H the
    support loss's Hessian there and v solving (H + proximal) v = gradient of the query loss,

        by the slow weights   proximal v
        by the norm and all that is not adapted   the query's own gradient - (mixed second derivative) v

    v comes from `cg_steps` of conjugate gradient, a Hessian-vector product each, for all tasks at once.
    Memory does not depend on the number of inner steps.
    """
    derivatives = derivatives_of(net, episodes.support_x_TECHW, engine)
    inner = _InnerLoop(derivatives, state, episodes, pulled(state, proximal))
    for step in range(ask.inner_steps):
        if ask.measure_all:
            inner.look(step)
        inner.step(step)
    norm = NormPass(state.norm, state.running, 0)
    support = derivatives.gradient(inner.fast, inner.support, norm, keep=True)
    query = inner.weigh(ask.inner_steps)
    still = {name: torch.zeros_like(part) for name, part in query.fast.items() if name not in state.rates}

    def pulled_product(direction: Params) -> Params:
        products, _ = derivatives.product(support.tape, direction | still)
        return {name: products[name] + proximal * part for name, part in direction.items()}

    wanted = {name: query.fast[name] for name in state.rates}
    solved = conjugate_gradient(pulled_product, wanted, cg_steps)
    products, mixed = derivatives.product(support.tape, solved | still)
    tasks = len(episodes.query_y_TE)
    grads = {name: proximal * v.mean(0) for name, v in solved.items()}
    grads |= {name: (query.fast[name] - products[name]).mean(0) for name in still}
    for name, rows_RC in state.norm.items():
        grads[name] = torch.zeros_like(rows_RC)
        grads[name][0] = (query.norm[name] - mixed[name]) / tasks
    return inner.measured(grads, {})


def conjugate_gradient(product: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Solve A x = b for every task, A being given by its products (Hestenes & Stiefel 1952).

    A task stops where it finds no more curvature or nothing left to do; of indefinite A the solution is that
    on the directions found so far.
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


class _InnerLoop:
    """An inner loop without a graph, and what is measured along it."""

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, stepped: Stepper
    ) -> None:
        self.derivatives, self.state, self.episodes, self.stepped = derivatives, state, episodes, stepped
        self.support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        self.query = derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE)
        self.fast = expanded(state.slow, len(episodes.query_y_TE))
        self.support_losses: list[Tensor] = []
        self.query_losses: dict[int, Tensor] = {}
        self.query_scores: dict[int, Tensor] = {}
        self.passes: list[NormPass] = []

    def step(self, step: int) -> None:
        """One inner step, on the support set or its mini-batch."""
        norm = NormPass(self.state.norm, self.state.running, step)
        batch = mini_batch(self.episodes, step)
        prepared = self.support if batch is None else self.derivatives.prepare(*batch)
        found = self.derivatives.gradient(self.fast, prepared, norm)
        self.passes.append(norm)
        self.support_losses.append(found.loss_T.mean())
        self.fast = self.stepped(self.fast, found.fast, step)

    def look(self, steps: int) -> None:
        """Measure the query set after some steps."""
        outputs_TEN = self.derivatives.logits(self.fast, self.query, self._norm(steps))
        self._note(steps, outputs_TEN)

    def weigh(self, steps: int) -> Gradient:
        """The same, with its gradient."""
        norm = self._norm(steps)
        found = self.derivatives.gradient(self.fast, self.query, norm)
        self.passes.append(norm)
        self._note(steps, found.logits_TEN)
        return found

    def _norm(self, steps: int) -> NormPass:
        return NormPass(self.state.norm, self.state.running, max(steps - 1, 0))

    def _note(self, steps: int, outputs_TEN: Tensor) -> None:
        objective, y_TE = self.derivatives.net.objective, self.episodes.query_y_TE
        self.query_losses[steps] = objective.loss(outputs_TEN, y_TE).mean()
        self.query_scores[steps] = objective.score(outputs_TEN, y_TE).mean()

    def measured(self, grads: dict[str, Tensor], moments: Params) -> Measured:
        """With the gradients of what is meta-learnt; the meta-loss is that after the last step."""
        losses = self.query_losses, self.query_scores
        last = self.query_losses[max(self.query_losses)]
        return Measured(grads, last, torch.stack(self.support_losses), *losses, self.passes, moments)
