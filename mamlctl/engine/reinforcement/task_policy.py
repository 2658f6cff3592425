"""The loss and the divergence of one task's policy, and their derivatives with respect to its weights.

In an action a with the noise n = (a - mean) / s, log pi has the derivatives

    q = n / s     with respect to the mean         p = n^2 - 1     with respect to log s

The loss of `policy_gradient.py` is a sum of v = -r A / E, with r the likelihood ratio. The first derivative
of v is v times that of log pi, and its second one is v times that of log pi plus the product of the first
ones.

The mean divergence of policies from themselves has no first derivative. Its second derivative is G^T M G,
with G those of mean and log s, and M the metric: 1 / s^2 for the mean and 2 for log s (Amari 1998; Martens
2020, arXiv:1412.1193, section 8).

Shapes: E states, A numbers of an action.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from mamlctl.engine.nets.batch_norm import Params
from mamlctl.engine.nets.mlp import DEVIATION, GaussianPolicy
from mamlctl.engine.reinforcement.layers import Layers, Trilinear
from mamlctl.engine.reinforcement.rollouts import LEAST_LOG, Trajectories


class TaskPolicy:
    """A policy in the states of a task's trajectories, without those after the end of a trajectory."""

    def __init__(
        self,
        policy: GaussianPolicy,
        weights: Mapping[str, Tensor],
        trained: Trajectories,
        advantage_TE: Tensor,
        task: int,
    ) -> None:
        """Pass the states of the task through its network.

        Args:
            policy: the policy.
            weights: of this task; they need not be those that drew the trajectories.
            trained: the trajectories of all tasks.
            advantage_TE: the advantages of all tasks.
            task: the task.
        """
        alive_E = trained.alive_TEH[task].flatten() > 0
        state_DE, action_AE, drawn_AE = (
            part_EN[alive_E].T.contiguous()
            for part_EN in (trained.states[task], trained.actions[task], trained.means[task])
        )
        self.layers = Layers.of(policy.mean, weights, state_DE)
        self.free_A = (weights[DEVIATION] >= LEAST_LOG).to(state_DE.dtype)
        log_A1 = weights[DEVIATION].clamp(min=LEAST_LOG).unsqueeze(1)
        drawn_log_A1 = trained.log_deviation_TA[task].unsqueeze(1)
        self.precision_A1 = (-log_A1).exp()  # 1 / s
        self.noise_AE = (action_AE - self.layers.mean_AE) * self.precision_A1  # n
        drawn_noise_AE = (action_AE - drawn_AE) * (-drawn_log_A1).exp()
        log_ratio_AE = (drawn_noise_AE.square() - self.noise_AE.square()) / 2 + drawn_log_A1 - log_A1
        self.v_E = advantage_TE[task][alive_E] * log_ratio_AE.sum(0).exp() / -action_AE.shape[1]
        # The divergence of these distributions from those that drew the actions.
        apart_AE = (drawn_AE - self.layers.mean_AE) * self.precision_A1
        ratio_A1 = (2 * (drawn_log_A1 - log_A1)).exp()
        divergence_AE = log_A1 - drawn_log_A1 + (ratio_A1 + apart_AE.square() - 1) / 2
        self.loss, self.divergence = self.v_E.sum(), divergence_AE.sum(0).mean()

    @cached_property
    def scores(self) -> tuple[Tensor, Tensor]:
        """q and p, _AE."""
        return self.noise_AE * self.precision_A1, self.noise_AE.square() - 1

    @cached_property
    def gradient(self) -> Params:
        """The gradient of the loss."""
        q_AE, p_AE = self.scores
        grads = self.layers.gradient(self.v_E * q_AE)
        return grads | {DEVIATION: self.free_A * (p_AE @ self.v_E)}

    def loss_product(self, tangent: Mapping[str, Tensor], *, once: bool = False) -> Params:
        """The second derivative of the loss times a tangent.

        Args:
            tangent: a change of the weights.
            once: whether it is the only product, for which nothing is prepared.
        """
        once = once or len(self.layers.names) != 3
        changes = self.layers.changes(tangent) if once else []
        mean_AE = changes[-1] if once else self.layers.push(tangent)
        log_A1 = self._log_change(tangent)
        q_AE, p_AE = self.scores
        along_E = (q_AE * mean_AE + log_A1 * p_AE).sum(0)  # change of log pi
        q_change_AE = -self.precision_A1.square() * mean_AE - 2 * log_A1 * q_AE
        p_change_AE = -2 * (q_AE * mean_AE + log_A1 * self.noise_AE.square())
        of_mean_AE = self.v_E * (along_E * q_AE + q_change_AE)
        of_log_A = self.free_A * ((along_E * p_AE + p_change_AE) @ self.v_E)
        if once:
            products = self.layers.gradient_change(self.v_E * q_AE, of_mean_AE, changes, tangent)
        else:
            products = self.layers.pull(of_mean_AE)
            for name, part in self._trilinear.product(tangent).items():
                products[name] += part
        return products | {DEVIATION: of_log_A}

    def divergence_product(self, tangent: Mapping[str, Tensor]) -> Params:
        """The second derivative of the divergence of policies from themselves, times a tangent."""
        mean_AE, log_A1 = self.layers.push(tangent), self._log_change(tangent)
        of_mean_AE = self.precision_A1.square() / mean_AE.shape[1] * mean_AE
        return self.layers.pull(of_mean_AE) | {DEVIATION: self.free_A * 2 * log_A1.squeeze(1)}

    @cached_property
    def _trilinear(self) -> Trilinear:
        return Trilinear.of(self.layers, self.v_E * self.scores[0])

    def _log_change(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """The change of log s with the weights, _A1."""
        return (self.free_A * tangent[DEVIATION]).unsqueeze(1)
