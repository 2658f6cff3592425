"""Batch norm over a set of one task's examples, composed of plain operations.

The native operator is wrong in second order under vectorised transforms (pytorch/functorch#534), and none
of its modes is what a meta-learner means; here the statistics that are used have a name: `Statistics`.
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

    def __call__(self, name: str, x_ETCHW: Tensor, fast: Mapping[str, Tensor]) -> Tensor:
        """Normalise, scale and shift -> _ETCHW; a norm that is adapted is among the fast weights."""
        gamma, beta = (part[..., None, None] for part in self.affine(name, fast))
        if self.statistics is Statistics.RUNNING:
            mean = self.row(f"{name}.mean")[:, None, None]
            var = self.row(f"{name}.var")[:, None, None]
        else:
            measured = x_ETCHW[: self.support_examples] if self.statistics is Statistics.SUPPORT else x_ETCHW
            var, mean = torch.var_mean(measured, dim=(0, 3, 4), correction=0, keepdim=True)
            count = measured.shape[0] * measured.shape[3] * measured.shape[4]
            self.saw(name, mean.detach()[0, :, :, 0, 0], var.detach()[0, :, :, 0, 0], count)
        return (x_ETCHW - mean) * (gamma * (var + EPS).rsqrt()) + beta

    def affine(self, name: str, fast: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer: each task's own, _TC, where they are adapted, else this step's, _C."""
        if f"{name}.weight" in fast:
            return fast[f"{name}.weight"], fast[f"{name}.bias"]
        return self.row(f"{name}.weight"), self.row(f"{name}.bias")

    def row(self, name: str) -> Tensor:
        """The row of this step of "norm1.weight", "norm1.bias", "norm1.mean" or "norm1.var" -> _C."""
        rows_RC = self.params[name] if name in self.params else self.running[name]
        return rows_RC[min(self.step, rows_RC.shape[0] - 1)]

    def saw(self, name: str, mean_TC: Tensor, var_TC: Tensor, count: int) -> None:
        """Note mean and biased variance of `count` values a channel; as torch does, keep the unbiased one."""
        self.seen[name] = mean_TC, var_TC * (count / max(count - 1, 1))


def accumulate(running: Params, passes: list[NormPass]) -> None:
    """Move the running statistics, in place, towards the mean over tasks and passes of each row.

    Rows that no pass used keep their values. One update per meta-step, whatever the number of tasks, and of
    passes that share them out.
    """
    for key, rows_RC in running.items():
        name, kind = key.rsplit(".", 1)
        used: dict[int, list[Tensor]] = {}
        for norm_pass in passes:
            row = min(norm_pass.step, rows_RC.shape[0] - 1)
            used.setdefault(row, []).append(norm_pass.seen[name][0 if kind == "mean" else 1])
        for row, seen in used.items():
            rows_RC[row].lerp_(torch.cat(seen).mean(0), MOMENTUM)


def init_params(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Weights 1 and biases 0, `rows` of them for every norm layer (name -> channels)."""
    weights = {f"{name}.weight": like.new_ones(rows, channels) for name, channels in layers.items()}
    return weights | {f"{name}.bias": like.new_zeros(rows, channels) for name, channels in layers.items()}


def init_running(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Means 0 and variances 1."""
    means = {f"{name}.mean": like.new_zeros(rows, channels) for name, channels in layers.items()}
    return means | {f"{name}.var": like.new_ones(rows, channels) for name, channels in layers.items()}
