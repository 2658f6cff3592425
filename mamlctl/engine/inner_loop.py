"""The inner loop: a task's own training on its support set, all tasks of a meta-batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamlctl.core.literals import InnerOptimizer
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.nets.base import HEAD, Net, Objective
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics

RATE = "rate."  # how the names of learnt inner rates begin, among what the outer optimiser moves


@dataclass
class MetaState:
    """All that meta-training changes. Keys are the checkpoint's and the display's."""

    slow: Params  # the initialisation: no task axis
    norm: Params  # batch-norm weights and biases, _RC
    # Inner learning rates of the tensors that are adapted: _I with LSLR, else _1; or a rate for each weight,
    # with an axis of 1 in front.
    rates: Params
    running: Params = field(default_factory=dict)  # batch-norm statistics, _RC; moved, not learnt
    rates_learnt: bool = False
    moments: Params = field(default_factory=dict)  # of the inner Adam, from task to task; moved, not learnt

    def learnable(self) -> dict[str, Tensor]:
        """Every tensor that the outer optimiser moves, under one flat name."""
        rates = {f"{RATE}{name}": rate for name, rate in self.rates.items()} if self.rates_learnt else {}
        return self.slow | self.norm | rates

    @property
    def example_tensor(self) -> Tensor:
        """A tensor of the state's device and type."""
        return next(iter(self.slow.values()))

    def norm_pass(
        self, step: int, statistics: Statistics = Statistics.OWN, support_examples: int = 0
    ) -> NormPass:
        """Batch norm of one pass at an inner step; arguments as in `NormPass`."""
        return NormPass(self.norm, self.running, step, statistics, support_examples)

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

    def head_alone(self) -> MetaState:
        """The head with its rates, as the state of a `HeadNet`."""
        slow = {name: self.slow[name] for name in HEAD}
        rates = {name: rate for name, rate in self.rates.items() if name in HEAD}
        moments = {name: moment for name, moment in self.moments.items() if name in HEAD or name == "steps"}
        return MetaState(slow, {}, rates, {}, self.rates_learnt, moments)

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


@dataclass
class Measurements:
    """What a meta-step measures along its inner loop: means over the tasks, on the device."""

    objective: Objective
    support_losses: list[Tensor] = field(default_factory=list)  # of inner step 1, 2, ...
    query_losses: dict[int, Tensor] = field(default_factory=dict)  # inner steps taken -> mean over tasks
    query_scores: dict[int, Tensor] = field(default_factory=dict)  # the same, of the objective's metric
    norm_passes: list[NormPass] = field(default_factory=list)  # of training, whose statistics accumulate

    def add_support(self, loss_T: Tensor, norm: NormPass) -> None:
        """Note an inner step."""
        self.support_losses.append(loss_T.mean())
        self.norm_passes.append(norm)

    def add_query(
        self, steps: int, outputs_TEN: Tensor, y_TE: Tensor, loss_T: Tensor | None = None
    ) -> Tensor:
        """Note the query set after `steps` inner steps; returns the mean loss, with its graph if it has one.

        `loss_T`: where it is known already.
        """
        loss = (self.objective.loss(outputs_TEN, y_TE) if loss_T is None else loss_T).mean()
        self.query_losses[steps] = loss.detach()
        self.query_scores[steps] = self.objective.score(outputs_TEN.detach(), y_TE).mean()
        return loss


def expanded(slow: Mapping[str, Tensor], tasks: int) -> Params:
    """Every task's copy of the weights, without copying and without a graph."""
    return {name: weight.detach().expand(tasks, *weight.shape) for name, weight in slow.items()}


def mini_batch(episodes: Episodes, step: int) -> tuple[Tensor, Tensor] | None:
    """The support examples of an inner step, x_TBCHW and y_TB; None where every step sees all."""
    if episodes.batches_TIB is None:
        return None
    at_TB = episodes.batches_TIB[:, step]
    task_T1 = torch.arange(len(at_TB), device=at_TB.device).unsqueeze(1)
    return episodes.support_x_TECHW[task_T1, at_TB], episodes.support_y_TE[task_T1, at_TB]


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

    # Those of the published code.
    BETA2 = 0.999
    EPS = 1e-8

    def __init__(self, state: MetaState, tasks: int) -> None:
        self.state, self.count = state, state.moments["steps"]
        self.second = {
            name: state.moments[name].expand(tasks, *weight.shape) for name, weight in state.slow.items()
        }

    def __call__(self, fast: Params, grads: Params, step: int) -> Params:
        """v = b v + (1 - b) g^2; then descent along g / (sqrt(v / (1 - b^count)) + eps)."""
        self.count = self.count + 1
        b = self.BETA2
        self.second = {name: b * v + (1 - b) * grads[name] ** 2 for name, v in self.second.items()}
        # The moments began with zeros, and are too small by this share.
        unbias = 1 - b**self.count
        scaled = {name: grads[name] / ((v / unbias).sqrt() + self.EPS) for name, v in self.second.items()}
        return self.state.stepped(fast, scaled, step)

    def moments(self) -> Params:
        """What the next tasks begin with."""
        return {name: v.mean(0) for name, v in self.second.items()} | {"steps": self.count}


@dataclass(frozen=True)
class InnerRule:
    """How an inner step moves the weights along their gradient: plain descent unless something is set."""

    proximal: float | None = None  # iMAML's pull to the initialisation
    optimizer: InnerOptimizer | None = None  # Reptile's

    def stepper(self, state: MetaState, tasks: int) -> Stepper:
        """The rule for one inner loop of so many tasks."""
        if self.optimizer == "adam":
            return AdamSteps(state, tasks)
        return state.stepped if self.proximal is None else pulled(state, self.proximal)


DESCENT = InnerRule()
