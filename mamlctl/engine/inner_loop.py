"""The inner loop: a task's own training on its support set, all tasks of a meta-batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params

RATE = "rate."  # how the names of learnt inner rates begin, among what the outer optimiser moves


@dataclass
class MetaState:
    """All that meta-training changes. Keys are the checkpoint's and the display's."""

    slow: Params  # the initialisation: no task axis
    norm: Params  # batch-norm weights and biases, _RC
    rates: Params  # inner learning rates of the tensors that are adapted: _I with LSLR, else _1; or a rate
    # for each weight, with an axis of 1 in front
    running: Params = field(default_factory=dict)  # batch-norm statistics, _RC; moved, not learnt
    rates_learnt: bool = False
    moments: Params = field(default_factory=dict)  # of the inner Adam, from task to task; moved, not learnt

    def learnable(self) -> dict[str, Tensor]:
        """Every tensor that the outer optimiser moves, under one flat name."""
        rates = {f"{RATE}{name}": rate for name, rate in self.rates.items()} if self.rates_learnt else {}
        return self.slow | self.norm | rates

    def rate(self, name: str, step: int) -> Tensor:
        """The inner learning rate of a tensor that is adapted; a step beyond the last one reuses it."""
        rates = self.rates[name]
        return rates[min(step, len(rates) - 1)]

    def stepped(self, fast: Mapping[str, Tensor], grads: Mapping[str, Tensor], step: int) -> Params:
        """The fast weights after an inner step along these gradients."""
        return {
            name: weight - self.rate(name, step) * grads[name] if name in self.rates else weight
            for name, weight in fast.items()
        }

    def frozen(self) -> MetaState:
        """The same tensors without their gradients, so that evaluation builds no graph through them."""
        slow, norm, rates, running, moments = (
            {name: tensor.detach() for name, tensor in part.items()}
            for part in (self.slow, self.norm, self.rates, self.running, self.moments)
        )
        return MetaState(slow, norm, rates, running, self.rates_learnt, moments)

    def stored(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, sharing its memory but no gradient."""
        state = self.frozen()
        rates = {f"{RATE}{name}": rate for name, rate in state.rates.items()}
        running = {f"running.{name}": tensor for name, tensor in state.running.items()}
        moments = {f"moment.{name}": tensor for name, tensor in state.moments.items()}
        return state.slow | state.norm | rates | running | moments


@dataclass(frozen=True)
class InnerPoint:
    """Where a task stands after some inner steps."""

    steps: int
    fast: Params  # every tensor leads with T
    support_loss_T: Tensor | None  # of the step that led here; None at the start
    norm: NormPass | None  # of that step's support pass


def start(slow: Mapping[str, Tensor], tasks: int) -> Params:
    """Every task's copy of the initialisation, without copying; ready to be differentiated."""
    fast = {name: weight.expand(tasks, *weight.shape) for name, weight in slow.items()}
    # In evaluation the slow weights want no gradient, but the inner loop still does.
    return {
        name: weight if weight.requires_grad else weight.requires_grad_() for name, weight in fast.items()
    }


def adapt(
    net: Net,
    state: MetaState,
    x_TECHW: Tensor,
    y_TE: Tensor,
    *,
    steps: int,
    first_order: bool,
) -> Iterator[InnerPoint]:
    """Yield the fast weights before the first and after each of `steps` gradient steps on the support set.

    Section 2.2 of arXiv:1703.03400. First order: the gradients count as constants, so that only the
    identity path and the rates are differentiated. A step beyond the last learnt rate reuses it. The support
    set is normalised by its own statistics, in evaluation too: with the running ones, which do not follow the
    weights, rates that were learnt in training make the inner loop diverge (measured: README).
    """
    fast = start(state.slow, x_TECHW.shape[0])
    yield InnerPoint(0, fast, None, None)
    for step in range(steps):
        norm = NormPass(state.norm, state.running, step)
        loss_T = net.objective.loss(net(fast, x_TECHW, norm), y_TE)
        # Tasks share no fast weight, so the gradient of the summed loss is every task's own gradient.
        adapted = [fast[name] for name in state.rates]
        grads = torch.autograd.grad(loss_T.sum(), adapted, create_graph=not first_order)
        fast = state.stepped(fast, dict(zip(state.rates, grads, strict=True)), step)
        yield InnerPoint(step + 1, fast, loss_T.detach(), norm)


def query_logits(
    net: Net, state: MetaState, point: InnerPoint, query_x_TECHW: Tensor
) -> tuple[Tensor, NormPass]:
    """Scores of the query set -> logits_TEN, with the norm row of the step that led to `point`."""
    norm = NormPass(state.norm, state.running, max(point.steps - 1, 0))
    return net(point.fast, query_x_TECHW, norm), norm


Stepper = Callable[[Params, Params, int], Params]  # fast weights, their gradients, step -> fast weights


def pulled(state: MetaState, proximal: float) -> Stepper:
    """Gradient descent on the support loss plus proximal / 2 times the squared way from the initialisation.

    Equation 3 of arXiv:1909.04630 (iMAML).
    """

    def stepped(fast: Params, grads: Params, step: int) -> Params:
        slow = state.slow
        pulls = {name: grads[name] + proximal * (fast[name] - slow[name]) for name in state.rates}
        return state.stepped(fast, pulls, step)

    return stepped


class AdamSteps:
    """Inner Adam with beta1 = 0: every gradient divided by the root of a running mean of its squares.

    As in Reptile's published code the second moments go on from task to task; tasks that are adapted side by
    side all begin with the last ones, and leave their mean.
    """

    BETA2, EPS = 0.999, 1e-8  # of the published code

    def __init__(self, state: MetaState, tasks: int) -> None:
        self.state, self.count = state, state.moments["steps"]
        self.second = {
            name: state.moments[name].expand(tasks, *weight.shape) for name, weight in state.slow.items()
        }

    def __call__(self, fast: Params, grads: Params, step: int) -> Params:
        """One step."""
        self.count = self.count + 1
        kept = self.BETA2
        self.second = {name: kept * v + (1 - kept) * grads[name] ** 2 for name, v in self.second.items()}
        unbias = 1 - kept**self.count
        scaled = {name: grads[name] / ((v / unbias).sqrt() + self.EPS) for name, v in self.second.items()}
        return self.state.stepped(fast, scaled, step)

    def moments(self) -> Params:
        """What the next tasks begin with."""
        return {name: v.mean(0) for name, v in self.second.items()} | {"steps": self.count}
