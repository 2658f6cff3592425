"""Batch norm over a set of one task's examples, composed of plain operations.

The native operator is wrong in second order under vectorised transforms (pytorch/functorch#534), and none
of its modes is what a meta-learner means; here the statistics used are said out loud, as `Statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

EPS = 1e-5  # torch's default, and the reference's (section 1.6 of the published code's description)
MOMENTUM = 0.1  # weight of the newest statistics in the running ones; the reference's too

Params = dict[str, Tensor]


class Statistics(Enum):
    """Which mean and variance normalise a set of examples."""

    OWN = "transductive"  # of the set itself: predictions of one query depend on the other queries
    RUNNING = "running"  # accumulated in training
    SUPPORT = "support"  # of the task's support set, passed through the same weights


@dataclass
class NormPass:
    """Batch norm for one forward pass: which rows and statistics it uses, and what it saw."""

    params: Mapping[str, Tensor]  # "norm1.weight", "norm1.bias" -> _RC; R = inner steps with BNWB, else 1
    running: Mapping[str, Tensor]  # "norm1.mean", "norm1.var" -> _RC; R = inner steps with BNRS, else 1
    step: int  # inner step; one beyond the last row reuses the last row
    statistics: Statistics = Statistics.OWN
    support_examples: int = 0  # with Statistics.SUPPORT: how many leading examples are the support set
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> mean_TC, variance_TC

    def __call__(self, name: str, x_ETCHW: Tensor) -> Tensor:
        """Normalise, scale and shift -> _ETCHW."""
        gamma_C = _row(self.params[f"{name}.weight"], self.step)[:, None, None]
        beta_C = _row(self.params[f"{name}.bias"], self.step)[:, None, None]
        if self.statistics is Statistics.RUNNING:
            mean = _row(self.running[f"{name}.mean"], self.step)[:, None, None]
            var = _row(self.running[f"{name}.var"], self.step)[:, None, None]
        else:
            measured = x_ETCHW[: self.support_examples] if self.statistics is Statistics.SUPPORT else x_ETCHW
            var, mean = torch.var_mean(measured, dim=(0, 3, 4), correction=0, keepdim=True)
            self.seen[name] = mean.detach()[0, :, :, 0, 0], _unbiased(var.detach(), measured)[0, :, :, 0, 0]
        return (x_ETCHW - mean) * (gamma_C * (var + EPS).rsqrt()) + beta_C


def _row(rows_RC: Tensor, step: int) -> Tensor:
    return rows_RC[min(step, rows_RC.shape[0] - 1)]


def _unbiased(var: Tensor, measured_ETCHW: Tensor) -> Tensor:
    """Running variances estimate the population's, as torch's do."""
    count = measured_ETCHW.shape[0] * measured_ETCHW.shape[3] * measured_ETCHW.shape[4]
    return var * (count / max(count - 1, 1))


def accumulate(running: Params, passes: list[NormPass]) -> None:
    """Move the running statistics, in place, towards the mean over tasks and passes of each row.

    Rows that no pass used keep their values. One update per meta-step, whatever the number of tasks.
    """
    for key, rows_RC in running.items():
        name, kind = key.rsplit(".", 1)
        used: dict[int, list[Tensor]] = {}
        for norm_pass in passes:
            row = min(norm_pass.step, rows_RC.shape[0] - 1)
            used.setdefault(row, []).append(norm_pass.seen[name][0 if kind == "mean" else 1])
        for row, seen in used.items():
            rows_RC[row].lerp_(torch.stack(seen).mean((0, 1)), MOMENTUM)


def init_params(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Weights 1 and biases 0, `rows` of them for every norm layer (name -> channels)."""
    weights = {f"{name}.weight": like.new_ones(rows, channels) for name, channels in layers.items()}
    return weights | {f"{name}.bias": like.new_zeros(rows, channels) for name, channels in layers.items()}


def init_running(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Means 0 and variances 1."""
    means = {f"{name}.mean": like.new_zeros(rows, channels) for name, channels in layers.items()}
    return means | {f"{name}.var": like.new_ones(rows, channels) for name, channels in layers.items()}
