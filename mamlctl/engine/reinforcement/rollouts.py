"""Rollouts: all trajectories of all tasks of a meta-batch, one time after another.

Shapes: T tasks, E trajectories, H times, D coordinates of a state, A numbers of an action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.navigation import action_noise
from mamlctl.data.worlds import World
from mamlctl.engine.nets.batch_norm import NormPass
from mamlctl.engine.nets.mlp import DEVIATION, GaussianPolicy

LEAST_LOG = math.log(1e-6)  # as in the published code (maml_minimal_gauss_mlp_policy.py)


@dataclass(frozen=True)
class Trajectories:
    """What the policies of all tasks did, and how they were rewarded."""

    state_TEHD: Tensor  # before each action
    action_TEHA: Tensor
    reward_TEH: Tensor  # 0 after the end of a trajectory
    alive_TEH: Tensor  # 1 for times before the end of a trajectory, else 0
    mean_TEHA: Tensor  # of the normal distributions from which the actions were drawn
    log_deviation_TA: Tensor  # logarithms of their standard deviations

    @property
    def states(self) -> Tensor:
        """The states of all trajectories and times, _TED."""
        return self.state_TEHD.flatten(1, 2)

    @property
    def actions(self) -> Tensor:
        """The actions in these states, _TEA."""
        return self.action_TEHA.flatten(1, 2)

    @property
    def means(self) -> Tensor:
        """The means of the distributions of these actions, _TEA."""
        return self.mean_TEHA.flatten(1, 2)

    @property
    def return_TE(self) -> Tensor:
        """The sum of the rewards of each trajectory, not discounted."""
        return self.reward_TEH.sum(-1)

    def first(self, trajectories: int) -> Trajectories:
        """The first trajectories of every task."""
        if trajectories >= self.reward_TEH.shape[1]:
            return self
        return Trajectories(
            self.state_TEHD[:, :trajectories],
            self.action_TEHA[:, :trajectories],
            self.reward_TEH[:, :trajectories],
            self.alive_TEH[:, :trajectories],
            self.mean_TEHA[:, :trajectories],
            self.log_deviation_TA,
        )

    def mean_over_times(self, value_TE: Tensor) -> Tensor:
        """The mean over all states before the end of their trajectories -> _T; `value_TE` as `states`."""
        alive_TE = self.alive_TEH.flatten(1)
        return (value_TE * alive_TE).sum(1) / alive_TE.sum(1)


@torch.no_grad()
def rollout(
    policy: GaussianPolicy,
    fast: Mapping[str, Tensor],
    episodes: Episodes,
    world: World,
    *,
    inner_step: int,
    trajectories: int,
    sees_goal: bool = False,
) -> Trajectories:
    """Let the policy of each task move in its world.

    Args:
        policy: the policy.
        fast: its weights, each with the leading axis T.
        episodes: the tasks: starts, goals and keys of the noise.
        world: their rewards and movements.
        inner_step: inner steps taken before, which selects the noise.
        trajectories: E.
        sees_goal: whether a state contains the goal, after the position.
    """
    goal_TD, keys_T = episodes.query_y_TE, episodes.keys_T
    assert keys_T is not None
    noise_TEHA = action_noise(keys_T, inner_step, trajectories, world.horizon).to(goal_TD)
    log_TA = fast[DEVIATION].clamp(min=LEAST_LOG)
    noise_HTEA = (log_TA.exp()[:, None, None] * noise_TEHA).movedim(2, 0)
    norm = NormPass({}, {}, 0)  # policies have no batch norm
    goal_T1D = goal_TD.unsqueeze(1)
    position_TED = goal_T1D.new_zeros(len(goal_TD), trajectories, world.dimensions)
    alive_TE = position_TED.new_ones(position_TED.shape[:2])
    steps = []
    for noise_TEA in noise_HTEA:
        state_TED = _with_goal(position_TED, goal_T1D) if sees_goal else position_TED
        mean_TEA = policy(fast, state_TED, norm)
        action_TEA = mean_TEA + noise_TEA
        velocity_TED = (world.scale * action_TEA).clamp(-world.limit, world.limit)
        # The robot stays where it was when its trajectory ended, so that no state grows without bound.
        position_TED = position_TED + velocity_TED * alive_TE.unsqueeze(-1)
        squared_TE = (position_TED - goal_T1D).square().sum(-1)
        reward_TE = -(squared_TE if world.squared else squared_TE.sqrt()) * alive_TE
        steps.append((state_TED, action_TEA, reward_TE, alive_TE, mean_TEA))
        alive_TE = alive_TE * (squared_TE >= world.near**2)
    state, action, reward, alive, mean = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
    return Trajectories(state, action, reward, alive, mean, log_TA)


def _with_goal(position_TED: Tensor, goal_T1D: Tensor) -> Tensor:
    return torch.cat([position_TED, goal_T1D.expand_as(position_TED)], -1)
