"""The inner loop: each task's own training on its support set, for all tasks of a meta-batch at once.

Inner step k of a task is, with g_k the gradient of the support loss at the fast weights w_k and a_k the inner
learning rate (Finn et al. 2017, arXiv:1703.03400, section 2.2),

    g_k = grad_w L_support(w_k; f_k)        w_{k+1} = w_k - a_k g_k        k = 0 .. I-1

where w_0 are the slow weights and f_k the batch-norm weights and biases. The outer optimiser learns w_0 and
f_k: one row f for all steps, or one per step with BNWB. The rates are fixed, or learnt: per tensor and step
with LSLR (both are improvements of MAML++, arXiv:1810.09502, section 4), per weight with Meta-SGD
(arXiv:1707.09835, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mamlctl.core.literals import InnerOptimizer
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.nets.base import HEAD, Net, Objective
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics

# Prefixes among the names of learnable and stored tensors.
RATE = "rate."  # inner rates
RUNNING = "running."  # running batch-norm statistics
MOMENT = "moment."  # state of Reptile's inner Adam


def row_of(rows: Tensor, step: int) -> Tensor:
    """Return the row of an inner step; steps beyond the last row use the last row."""
    return rows[min(step, len(rows) - 1)]


@dataclass
class MetaState:
    """All tensors that meta-training changes; checkpoints and displays use the same names."""

    slow: Params  # the initialisation w_0; no task axis
    norm: Params  # batch-norm weights and biases, _RC; R = I rows with BNWB, else 1
    # Inner learning rates, one entry for each adapted tensor: shape _I with LSLR, _1 with one rate for all
    # steps, or (1, *shape of the tensor) with one rate per weight (Meta-SGD).
    rates: Params
    running: Params = field(default_factory=dict)  # running batch-norm statistics, _RC; no gradient
    rates_learnt: bool = False
    moments: Params = field(default_factory=dict)  # state of Reptile's inner Adam; no gradient
    frozen_names: frozenset[str] = frozenset()  # stored tensors that meta-steps leave as they are (--freeze)

    def learnable(self) -> dict[str, Tensor]:
        """Return every tensor that the outer optimiser updates, in one flat dictionary."""
        rates = {f"{RATE}{name}": rate for name, rate in self.rates.items()} if self.rates_learnt else {}
        whole = self.slow | self.norm | rates
        return {name: tensor for name, tensor in whole.items() if name not in self.frozen_names}

    @property
    def example_tensor(self) -> Tensor:
        """Any tensor of the state, for its device and dtype."""
        return next(iter(self.slow.values()))

    def norm_pass(
        self,
        step: int,
        statistics: Statistics = Statistics.OWN,
        support_examples: int = 0,
        keys_T: Tensor | None = None,
    ) -> NormPass:
        """Set up batch norm for one forward pass.

        Args:
            step: the inner step, counted from 0.
            statistics: which mean and variance normalise the examples.
            support_examples: with Statistics.SUPPORT, how many leading examples are the support set.
            keys_T: a random number of each task and set, for dropout; None for a pass without dropout.
        """
        return NormPass(self.norm, self.running, step, statistics, support_examples, keys_T)

    def rate(self, name: str, step: int) -> Tensor:
        """Return the inner learning rate of an adapted tensor."""
        return row_of(self.rates[name], step)

    def stepped(self, fast: Mapping[str, Tensor], grads: Mapping[str, Tensor], step: int) -> Params:
        """Take one inner step, w_{k+1} = w_k - a_k g_k.

        Args:
            fast: the fast weights w_k, each with the leading axis T.
            grads: the gradients g_k of the adapted tensors, in the shapes of `fast`.
            step: k, counted from 0.

        Returns:
            The fast weights w_{k+1}; tensors without an inner rate are not adapted and stay the same.
        """
        return {
            name: weight - self.rate(name, step) * grads[name] if name in self.rates else weight
            for name, weight in fast.items()
        }

    def head_alone(self) -> MetaState:
        """Return the head and its rates as the state of a `HeadNet`."""
        slow = {name: self.slow[name] for name in HEAD}
        rates = {name: rate for name, rate in self.rates.items() if name in HEAD}
        moments = {name: moment for name, moment in self.moments.items() if name in HEAD or name == "steps"}
        return MetaState(slow, {}, rates, {}, self.rates_learnt, moments)

    def frozen(self) -> MetaState:
        """Return the same tensors detached, so that evaluation builds no graph through them."""
        slow, norm, rates, running, moments = (
            {name: tensor.detach() for name, tensor in part.items()}
            for part in (self.slow, self.norm, self.rates, self.running, self.moments)
        )
        return MetaState(slow, norm, rates, running, self.rates_learnt, moments)

    def stored(self) -> dict[str, Tensor]:
        """Return every tensor that a checkpoint contains, detached but not copied."""
        state = self.frozen()
        rates = {f"{RATE}{name}": rate for name, rate in state.rates.items()}
        running = {f"{RUNNING}{name}": tensor for name, tensor in state.running.items()}
        moments = {f"{MOMENT}{name}": tensor for name, tensor in state.moments.items()}
        return state.slow | state.norm | rates | running | moments


@dataclass(frozen=True)
class InnerPoint:
    """The state of all tasks after a number of inner steps."""

    steps: int  # inner steps taken so far
    fast: Params  # every tensor has the leading axis T
    support_loss_T: Tensor | None  # support loss before the latest step; None at the start
    norm: NormPass | None  # batch norm of the latest step's support pass; None at the start


def start(slow: Mapping[str, Tensor], tasks: int) -> Params:
    """Expand the slow weights to one set per task, without copying, ready to be differentiated."""
    fast = {name: weight.expand(tasks, *weight.shape) for name, weight in slow.items()}
    # In evaluation the slow weights require no gradient, but the inner loop still differentiates.
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
    keys_T: Tensor | None = None,
) -> Iterator[InnerPoint]:
    """Run the inner loop w_{k+1} = w_k - a_k g_k, differentiable by autograd (arXiv:1703.03400, section 2.2).

    The support set is normalised by its own statistics, in evaluation too. The running statistics do not
    follow the fast weights, and with them the rates learnt in training make the inner loop diverge: 5-way
    accuracy falls to chance (19.9 ± 0.4 %, 200 tasks).

    Args:
        net: the network.
        state: slow weights, norm rows and rates.
        x_TECHW: support examples.
        y_TE: their labels or values.
        steps: the number of inner steps; steps beyond the last learnt rate use the last one.
        first_order: treat each g_k as a constant, so that only the identity path from w_0 and the rates are
            differentiated (the first-order approximation of section 5.2 of the paper).
        keys_T: as in `MetaState.norm_pass`.

    Yields:
        The fast weights before the first step and after each step: steps + 1 points.
    """
    fast = start(state.slow, x_TECHW.shape[0])
    yield InnerPoint(0, fast, None, None)
    for step in range(steps):
        norm = state.norm_pass(step, keys_T=keys_T)
        loss_T = net.objective.loss(net(fast, x_TECHW, norm), y_TE)
        # Tasks share no fast weights, so the gradient of the summed loss contains each task's own gradient.
        adapted = [fast[name] for name in state.rates]
        grads = torch.autograd.grad(loss_T.sum(), adapted, create_graph=not first_order)
        fast = state.stepped(fast, dict(zip(state.rates, grads, strict=True)), step)
        yield InnerPoint(step + 1, fast, loss_T.detach(), norm)


def query_logits(
    net: Net, state: MetaState, point: InnerPoint, query_x_TECHW: Tensor, keys_T: Tensor | None = None
) -> tuple[Tensor, NormPass]:
    """Pass the query set through the fast weights of `point`.

    Args:
        net: the network.
        state: the norm rows.
        point: the fast weights after k inner steps.
        query_x_TECHW: query examples.
        keys_T: as in `MetaState.norm_pass`.

    Returns:
        Class scores or values, logits_TEN, and the norm pass that computed them.
    """
    # The query set after k steps uses the norm row of step k - 1, the step that led to these weights.
    norm = state.norm_pass(max(point.steps - 1, 0), keys_T=keys_T)
    return net(point.fast, query_x_TECHW, norm), norm


@dataclass
class Measurements:
    """Losses and scores of each task along the inner loop of a meta-step, kept on the device."""

    objective: Objective
    support_losses_T: list[Tensor] = field(default_factory=list)  # before inner step 1, 2, ..., I
    query_losses_T: dict[int, Tensor] = field(default_factory=dict)  # by the number of inner steps taken
    query_scores_T: dict[int, Tensor] = field(default_factory=dict)  # the same for the objective's metric
    norm_passes: list[NormPass] = field(default_factory=list)  # training passes; these update `running`

    def add_support(self, loss_T: Tensor, norm: NormPass) -> None:
        """Record the support loss and the norm pass of one inner step."""
        self.support_losses_T.append(loss_T)
        self.norm_passes.append(norm)

    def add_query(
        self,
        steps: int,
        outputs_TEN: Tensor,
        y_TE: Tensor,
        loss_T: Tensor | None = None,
        score_T: Tensor | None = None,
    ) -> Tensor:
        """Record the query loss and score after `steps` inner steps.

        Args:
            steps: inner steps taken.
            outputs_TEN: class scores or values of the query set.
            y_TE: its labels or values.
            loss_T: the loss of each task, if it is already computed.
            score_T: the same for the score.

        Returns:
            loss_T, with its autograd graph if it has one.
        """
        if loss_T is None:
            loss_T = self.objective.loss(outputs_TEN, y_TE)
        if score_T is None:
            score_T = self.objective.score(outputs_TEN.detach(), y_TE)
        self.query_losses_T[steps], self.query_scores_T[steps] = loss_T.detach(), score_T
        return loss_T


def expanded(slow: Mapping[str, Tensor], tasks: int) -> Params:
    """Expand the weights to one set per task, without copying and without a graph."""
    return {name: weight.detach().expand(tasks, *weight.shape) for name, weight in slow.items()}


def mini_batch(episodes: Episodes, step: int) -> tuple[Tensor, Tensor] | None:
    """Return the support examples of inner step `step` as x_TBCHW, y_TB; None if every step uses all."""
    if episodes.batches_TIB is None:
        return None
    at_TB = episodes.batches_TIB[:, step]
    task_T1 = torch.arange(len(at_TB), device=at_TB.device).unsqueeze(1)
    return episodes.support_x_TECHW[task_T1, at_TB], episodes.support_y_TE[task_T1, at_TB]


Stepper = Callable[[Params, Params, int], Params]  # fast weights, their gradients, step -> fast weights


def proximal_descent(state: MetaState, proximal: float) -> Stepper:
    """Return iMAML's inner step: gradient descent on L_support(w) + proximal/2 |w - w_0|^2.

    The objective is equation 3 of arXiv:1909.04630; its gradient is g_k + proximal (w_k - w_0).
    """

    def stepped(fast: Params, grads: Params, step: int) -> Params:
        slow = state.slow
        pulls = {name: grads[name] + proximal * (fast[name] - slow[name]) for name in state.rates}
        return state.stepped(fast, pulls, step)

    return stepped


class AdamSteps:
    """Reptile's inner optimiser: Adam with beta1 = 0, as in the published code of arXiv:1803.02999.

    The second moments v and the step count carry over from task to task, as they do there. Tasks that are
    adapted together all start from the stored moments, and the mean over these tasks is stored again.
    """

    BETA2 = 0.999  # Adam's defaults, which the published code uses
    EPS = 1e-8

    def __init__(self, state: MetaState, tasks: int) -> None:
        """Start an inner loop of `tasks` tasks from the stored moments."""
        self.state, self.count = state, state.moments["steps"]
        self.second = {
            name: state.moments[name].expand(tasks, *weight.shape) for name, weight in state.slow.items()
        }

    def __call__(self, fast: Params, grads: Params, step: int) -> Params:
        """Update v = b v + (1 - b) g^2, then descend along g / (sqrt(v / (1 - b^count)) + eps).

        Args:
            fast: the fast weights of all tasks.
            grads: their gradients g.
            step: the inner step, which selects its learnt rates.
        """
        self.count = self.count + 1
        b = self.BETA2
        self.second = {name: b * v + (1 - b) * grads[name] ** 2 for name, v in self.second.items()}
        # The moments started at 0, so v underestimates E[g^2] by the factor 1 - b^count.
        unbias = 1 - b**self.count
        scaled = {name: grads[name] / ((v / unbias).sqrt() + self.EPS) for name, v in self.second.items()}
        return self.state.stepped(fast, scaled, step)

    def moments(self) -> Params:
        """Return the moments that the next tasks start from."""
        return {name: v.mean(0) for name, v in self.second.items()} | {"steps": self.count}


@dataclass(frozen=True)
class InnerRule:
    """The update rule of an inner step: plain gradient descent unless one of the fields is set."""

    proximal: float | None = None  # lambda of iMAML, the strength of the pull towards the slow weights
    optimizer: InnerOptimizer | None = None  # Reptile's inner optimiser

    def stepper(self, state: MetaState, tasks: int) -> Stepper:
        """Return the update function for one inner loop of `tasks` tasks."""
        if self.optimizer == "adam":
            return AdamSteps(state, tasks)
        return state.stepped if self.proximal is None else proximal_descent(state, self.proximal)


DESCENT = InnerRule()
