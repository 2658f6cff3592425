"""The Gaussian distributions of actions.

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
