"""The Gaussian distributions of actions: samples, densities and divergences.

Shapes: T tasks, E states of all trajectories and times, D coordinates of a state, A numbers of an action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mamlctl.engine.nets.batch_norm import NormPass
from mamlctl.engine.nets.mlp import DEVIATION, GaussianPolicy

LEAST_LOG = math.log(1e-6)  # as in the published code (maml_minimal_gauss_mlp_policy.py)


@dataclass(frozen=True)
class Gaussian:
    """The distributions of actions in the states of all tasks."""

    mean_TEA: Tensor
    log_deviation_TA: Tensor

    @classmethod
    def of(cls, policy: GaussianPolicy, fast: Mapping[str, Tensor], x_TED: Tensor) -> Gaussian:
        """The distributions of a policy.

        Args:
            policy: the policy.
            fast: its weights, each with the leading axis T.
            x_TED: the states.
        """
        norm = NormPass({}, {}, 0)  # policies have no batch norm
        return cls(policy(fast, x_TED, norm), fast[DEVIATION].clamp(min=LEAST_LOG))

    def sample(self, normal_TEA: Tensor) -> Tensor:
        """Actions from standard normal noise."""
        return self.mean_TEA + self.log_deviation_TA.exp().unsqueeze(1) * normal_TEA

    def log_likelihood(self, action_TEA: Tensor) -> Tensor:
        """log pi(a | s) -> _TE."""
        log_TA = self.log_deviation_TA
        standard_TEA = (action_TEA - self.mean_TEA) * (-log_TA).exp().unsqueeze(1)
        constant_T = log_TA.sum(-1) + 0.5 * math.log(2 * math.pi) * log_TA.shape[-1]
        return -0.5 * standard_TEA.square().sum(-1) - constant_T.unsqueeze(1)

    def divergence_to(self, other: Gaussian) -> Tensor:
        """The Kullback-Leibler divergence KL(self || other) in each state -> _TE."""
        log_TA, other_log_TA = self.log_deviation_TA, other.log_deviation_TA
        apart_TEA = (self.mean_TEA - other.mean_TEA) * (-other_log_TA).exp().unsqueeze(1)
        ratio_TA = (2 * (log_TA - other_log_TA)).exp()
        of_deviations_T = (other_log_TA - log_TA + 0.5 * ratio_TA - 0.5).sum(-1)
        return 0.5 * apart_TEA.square().sum(-1) + of_deviations_T.unsqueeze(1)

    def detach(self) -> Gaussian:
        """The same without a graph."""
        return Gaussian(self.mean_TEA.detach(), self.log_deviation_TA.detach())
