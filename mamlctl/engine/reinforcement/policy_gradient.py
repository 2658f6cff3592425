"""Policy gradients, and the inner loop that follows them.

The loss of a task's trajectories, with A the advantages, is a mean over all states s with actions a,

    L(w) = -mean of r(w) A        r(w) = pi(a | s; w) / pi(a | s; w_s)

where w_s are the weights with which the actions were drawn. At w_s its gradient is the policy gradient
-mean of A grad log pi. Its second derivative there is

    -mean of A (grad^2 log pi + grad log pi grad log pi^T)

the one of the expected return (for one action per trajectory). The loss -mean of A log pi, whose gradient is
the same, lacks the last term: it ignores that other weights would have drawn these actions with another
likelihood (Al-Shedivat et al. 2018, arXiv:1710.03641; Foerster et al. 2018, arXiv:1802.05098). For longer
trajectories r(w) leaves out how earlier actions change the likelihood of a state, which would add much
variance (Rothfuss et al. 2019, arXiv:1810.06784, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.worlds import World
from mamlctl.engine.inner_loop import InnerRule, MetaState, expanded
from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.mlp import GaussianPolicy
from mamlctl.engine.reinforcement.advantages import advantages
from mamlctl.engine.reinforcement.rollouts import Trajectories, rollout
from mamlctl.engine.reinforcement.task_policy import TaskPolicy


@dataclass(frozen=True)
class Experience:
    """The trajectories of a task's policy after some inner steps, and their advantages."""

    measured: Trajectories  # whose returns are reported
    trained: Trajectories  # for the policy gradient
    advantage_TE: Tensor  # of `trained`


@dataclass(frozen=True)
class Sampling:
    """How the policies of tasks collect experience."""

    world: World
    discount: float
    gae: float
    sees_goal: bool = False

    def experience(
        self, policy: GaussianPolicy, fast: Params, episodes: Episodes, inner_step: int, *, last: bool
    ) -> Experience:
        """Sample the trajectories after some inner steps.

        Args:
            policy: the policy.
            fast: its weights, each with the leading axis T.
            episodes: the tasks.
            inner_step: inner steps taken.
            last: whether no inner step follows, so that all trajectories for measurements are used.
        """
        shots, queries = episodes.support_x_TECHW.shape[1], episodes.query_x_TECHW.shape[1]
        both = rollout(
            policy,
            fast,
            episodes,
            self.world,
            inner_step=inner_step,
            trajectories=queries if last else max(shots, queries),
            sees_goal=self.sees_goal,
        )
        trained = both.first(queries if last else shots)
        return Experience(both.first(queries), trained, advantages(trained, self.discount, self.gae))


@dataclass(frozen=True)
class PolicyPoint:
    """The policies of all tasks after a number of inner steps."""

    policy: GaussianPolicy
    fast: Params  # every tensor has the leading axis T
    experience: Experience

    @cached_property
    def tasks(self) -> list[TaskPolicy]:
        """The policy of each task, with its loss and derivatives.

        One task after another is faster than all at once: its tensors fit into the processor's cache.
        """
        trained, advantage_TE = self.experience.trained, self.experience.advantage_TE
        return [
            TaskPolicy(self.policy, weights, trained, advantage_TE, task)
            for task, weights in enumerate(_unstacked(self.fast))
        ]


Collect = Callable[[int, Params], Experience]  # inner steps taken, fast weights -> experience


@torch.no_grad()
def adapt(
    policy: GaussianPolicy,
    state: MetaState,
    collect: Collect,
    *,
    tasks: int,
    steps: int,
    rule: InnerRule | None = None,
) -> Iterator[PolicyPoint]:
    """Follow the policy gradient, w_{k+1} = w_k - a_k grad L(w_k); new trajectories before every step.

    Args:
        policy: the policy.
        state: slow weights and rates.
        collect: samples trajectories with the weights, or returns those that were sampled before.
        tasks: T.
        steps: inner steps I.
        rule: another update rule of an inner step.

    Yields:
        The policies before the first step and after each step: I + 1 points.
    """
    fast = expanded(state.slow, tasks)
    update = (rule or InnerRule()).stepper(state, tasks)
    for step in range(steps + 1):
        point = PolicyPoint(policy, fast, collect(step, fast))
        yield point
        if step < steps:
            fast = update(fast, _stacked([task.gradient for task in point.tasks]), step)


def _stacked(parts: Sequence[Params]) -> Params:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _unstacked(fast: Params) -> list[Params]:
    unbound = (tensor.unbind() for tensor in fast.values())
    return [dict(zip(fast, parts, strict=True)) for parts in zip(*unbound, strict=True)]
