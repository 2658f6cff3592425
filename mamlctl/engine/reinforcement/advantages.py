"""Advantages: how much better an action was than the baseline of its task expected.

With r_t the rewards, d the discount, and b the baseline, the generalised advantage of Schulman et al. 2016
(arXiv:1506.02438, equation 16) is

    A_t = sum over l of (d g)^l delta_{t+l}        delta_t = r_t + d b(s_{t+1}) - b(s_t)

where g is --gae. With g = 1, as published for MAML, A_t is the discounted sum of rewards from t on, minus b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamlctl.engine.reinforcement.rollouts import Trajectories

RIDGE = 1e-5  # of the baseline's least squares, as in the published code (linear_feature_baseline.py)
TIME = 100.0  # the unit of time among the features, as there
EPS = 1e-8  # avoids a division by 0, as there


def discounted(value_TEH: Tensor, factor: float) -> Tensor:
    """Sum what follows, each value discounted by its distance: s_t = v_t + factor s_{t+1} -> _TEH."""
    if factor == 1:
        return value_TEH.flip(-1).cumsum(-1).flip(-1)
    sums = [value_TEH[..., -1]]
    for time in range(value_TEH.shape[-1] - 2, -1, -1):
        sums.append(value_TEH[..., time] + factor * sums[-1])
    return torch.stack(sums[::-1], -1)


def baseline(trajectories: Trajectories, discounted_TEH: Tensor) -> Tensor:
    """Fit the discounted returns of each task by least squares to s, s^2, t, t^2, t^3 and 1 -> b_TEH.

    The linear baseline of Duan et al. 2016 (arXiv:1604.06778, supplement 2). States after the end of a
    trajectory have no weight, and b is 0 there.
    """
    alive_TEH, state_TEHD = trajectories.alive_TEH.double(), trajectories.state_TEHD.double()
    times = torch.arange(alive_TEH.shape[-1], device=alive_TEH.device, dtype=torch.float64) / TIME
    powers_H4 = torch.stack([times, times**2, times**3, torch.ones_like(times)], -1)
    powers = powers_H4.expand(*alive_TEH.shape, -1)
    features = torch.cat([state_TEHD, state_TEHD.square(), powers], -1) * alive_TEH.unsqueeze(-1)
    x_TSF = features.flatten(1, 2)
    y_TS1 = (discounted_TEH.double() * alive_TEH).flatten(1).unsqueeze(-1)
    gram_TFF = x_TSF.transpose(1, 2) @ x_TSF
    ridge = RIDGE * torch.eye(gram_TFF.shape[-1], dtype=gram_TFF.dtype, device=gram_TFF.device)
    weights_TF1: Tensor = torch.linalg.solve(gram_TFF + ridge, x_TSF.transpose(1, 2) @ y_TS1)
    return (x_TSF @ weights_TF1).view_as(alive_TEH).to(discounted_TEH)


@torch.no_grad()
def advantages(trajectories: Trajectories, discount: float, gae: float) -> Tensor:
    """Compute the advantages, with mean 0 and deviation 1 over the states of each task -> _TE.

    Args:
        trajectories: of all tasks.
        discount: d.
        gae: g, 0..1.

    Returns:
        One number per state, in the order of `Trajectories.states`.
    """
    alive_TEH = trajectories.alive_TEH
    b_TEH = baseline(trajectories, discounted(trajectories.reward_TEH, discount))
    after_TEH = torch.cat([b_TEH[..., 1:], torch.zeros_like(b_TEH[..., :1])], -1)
    delta_TEH = trajectories.reward_TEH + discount * after_TEH - b_TEH
    raw_TE = (discounted(delta_TEH, discount * gae) * alive_TEH).flatten(1)
    centred_TE = raw_TE - trajectories.mean_over_times(raw_TE).unsqueeze(1)
    deviation_T = trajectories.mean_over_times(centred_TE.square()).sqrt()
    return centred_TE / (deviation_T.unsqueeze(1) + EPS)
