"""The meta-gradients of policies, which learn from trajectories instead of examples.

MAML for reinforcement learning (Finn et al. 2017, arXiv:1703.03400, section 4.2 and algorithm 3). With L_k
the loss of `reinforcement/policy_gradient.py` for the trajectories after k inner steps, and v_k the MSL
weights (0, .., 0, 1 without MSL),

    w_{k+1}   = w_k - a_k grad L_k(w_k)        k = 0 .. I-1, each with new trajectories
    meta-loss = mean over tasks of  sum over k of v_k L_k(w_k)

The outer step is that of `reinforcement/trpo.py`, as published, or one of Adam. Without inner steps (I = 0)
this is reinforcement learning on all goals at once: pre-training, or the oracle, whose states have the goal.
Every number that a meta-step reports as a loss is minus a mean return.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.core.literals import InnerOptimizer
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, means
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.engine.inner_loop import RATE, InnerRule, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.mlp import GaussianPolicy
from mamlctl.engine.reinforcement.jacobian import AdaptedPolicies
from mamlctl.engine.reinforcement.policy_gradient import Experience, PolicyPoint, Sampling, adapt
from mamlctl.engine.reinforcement.trpo import trust_region_step


@dataclass(frozen=True)
class PolicySearch:
    """MAML's meta-gradient of policies, or its step inside a trust region, as an `Outer`."""

    sampling: Sampling
    max_kl: float | None  # size of the trust region; None for a gradient

    def __call__(
        self, net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
    ) -> MetaStepResult:
        """Sample trajectories along the inner loop, then differentiate the meta-loss; as in `Outer`."""
        policy, steps = as_policy(net), request.inner_steps
        weights = [0.0, *map(float, request.msl_weights)] if steps else [1.0]
        points = list(walk(self.sampling, policy, state.frozen(), episodes, steps))
        sampled = [point.experience for point in points]
        adapted = AdaptedPolicies(state, points, weights, first_order=request.first_order)
        grads = adapted.gradient()
        if self.max_kl is not None:
            trial, old = Trial(policy, state.frozen(), sampled, weights), flat(adapted.learnable)

            def mean_of_pair(own: tuple[float, float]) -> tuple[float, float]:
                loss, divergence = request.mean(torch.tensor(own, dtype=torch.float64)).tolist()
                return loss, divergence

            # Means over the tasks of all processes, so that they take the same step.
            new = trust_region_step(
                old,
                request.mean(flat(grads)),
                lambda vector: request.mean(flat(adapted.divergence_product(unflat(vector, grads)))),
                mean_of_pair(measured(points, weights))[0],
                lambda vector: mean_of_pair(trial(unflat(vector, grads))),
                self.max_kl,
            )
            # An outer step of SGD with rate 1 takes the old values to the new ones.
            grads = unflat(old - new, grads)
        return result_of(sampled, grads, weights)


@dataclass(frozen=True)
class Trial:
    """The meta-loss for other slow weights and rates, of trajectories that were sampled before."""

    policy: GaussianPolicy
    state: MetaState  # frozen
    sampled: Sequence[Experience]  # after 0, 1, ..., I inner steps
    weights: Sequence[float]  # of the losses after them

    def __call__(self, learnable: Mapping[str, Tensor]) -> tuple[float, float]:
        """The loss, and the divergence of the policies from those that sampled the trajectories."""
        rates = {name: learnable.get(f"{RATE}{name}", rate) for name, rate in self.state.rates.items()}
        state = replace(
            self.state,
            slow={name: learnable.get(name, part) for name, part in self.state.slow.items()},
            rates=rates,
        )
        points = adapt(
            self.policy,
            state,
            lambda step, fast: self.sampled[step],
            tasks=len(self.sampled[0].advantage_TE),
            steps=len(self.sampled) - 1,
        )
        return measured(points, self.weights)


def measured(points: Iterable[PolicyPoint], weights: Sequence[float]) -> tuple[float, float]:
    """The weighted mean loss of policies, and their divergence from those that sampled their trajectories."""
    loss = divergence = 0.0
    for point, weight in zip(points, weights, strict=True):
        if weight:
            loss += weight * float(torch.stack([task.loss for task in point.tasks]).mean())
            divergence += weight * float(torch.stack([task.divergence for task in point.tasks]).mean())
    return loss, divergence


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Join tensors to one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    """Divide a vector into tensors with the names and shapes of `like`."""
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}


def walk(
    sampling: Sampling,
    policy: GaussianPolicy,
    state: MetaState,
    episodes: Episodes,
    steps: int,
    rule: InnerRule | None = None,
) -> Iterator[PolicyPoint]:
    """Adapt the policies with new trajectories before each step, without a graph to the slow weights.

    Args:
        sampling: how trajectories are collected.
        policy: the policy.
        state: slow weights and rates, frozen.
        episodes: the tasks.
        steps: inner steps I.
        rule: the update rule of an inner step.
    """

    def collect(step: int, fast: Params) -> Experience:
        return sampling.experience(policy, fast, episodes, step, last=step == steps)

    tasks = len(episodes.query_y_TE)
    return adapt(policy, state, collect, tasks=tasks, steps=steps, rule=rule)


def result_of(
    sampled: Sequence[Experience], grads: dict[str, Tensor], weights: Sequence[float] = (1.0,)
) -> MetaStepResult:
    """The measurements along an inner loop; all losses are minus mean returns.

    Args:
        sampled: the experience after 0, 1, ..., I inner steps.
        grads: the meta-gradient.
        weights: of the losses after 0, 1, ..., I inner steps in the meta-loss.
    """
    returns_T = {step: part.measured.return_TE.mean(1) for step, part in enumerate(sampled)}
    scores = means(returns_T)
    losses = {step: -score for step, score in scores.items()}
    before = [-part.trained.return_TE.mean() for part in sampled[:-1]]
    parts = [weight * loss for loss, weight in zip(losses.values(), weights, strict=True)]
    meta_loss = torch.stack(parts).sum()
    support = torch.stack(before) if before else meta_loss.new_zeros(0)
    return MetaStepResult(grads, meta_loss, support, losses, scores, [])


def reptile_of_policies(
    net: Net,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    *,
    sampling: Sampling,
    inner_optimizer: InnerOptimizer,
) -> MetaStepResult:
    """Compute Reptile's gradient w_0 - mean of w_I from trajectories (arXiv:1803.02999, algorithm 2).

    Args:
        net, state, episodes, request: as in `Outer`.
        sampling: how trajectories are collected.
        inner_optimizer: "adam", whose new moments the result contains, or "sgd".
    """
    rule = InnerRule(optimizer=inner_optimizer)
    points = list(walk(sampling, as_policy(net), state.frozen(), episodes, request.inner_steps, rule))
    grads = {
        name: weight.detach() - points[-1].fast[name].detach().mean(0) for name, weight in state.slow.items()
    }
    sampled = [point.experience for point in points]
    return result_of(sampled, grads, (0.0,) * request.inner_steps + (1.0,))


def untrained_policies(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest, *, sampling: Sampling
) -> MetaStepResult:
    """Measure the initial policy, and return gradients of 0; arguments as in `reptile_of_policies`."""
    sampled = [point.experience for point in walk(sampling, as_policy(net), state.frozen(), episodes, 0)]
    return result_of(sampled, {name: torch.zeros_like(value) for name, value in state.learnable().items()})


def returns_of_policies(
    request: PredictRequest, *, sampling: Sampling, rule: InnerRule | None = None
) -> Tensor:
    """Adapt to each task, and measure trajectories after 0, 1, ..., I inner steps -> returns as outputs_ITE1.

    Args:
        request: the tasks and the state; a `Predict`.
        sampling: how trajectories are collected.
        rule: the update rule of an inner step.
    """
    net, episodes = as_policy(request.derivatives.net), request.episodes
    points = walk(sampling, net, request.state, episodes, request.inner_steps, rule)
    returns_ITE = torch.stack([point.experience.measured.return_TE for point in points]).unsqueeze(-1)
    return returns_ITE if request.per_step else returns_ITE[-1:]


def as_policy(net: Net) -> GaussianPolicy:
    """The network as the policy that it is in reinforcement learning."""
    assert isinstance(net, GaussianPolicy)
    return net
