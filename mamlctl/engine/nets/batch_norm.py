"""Batch norm over one task's set of examples, composed of plain operations.

Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1, for each task and channel:

    mean, var over examples, height and width        y = gamma (x - mean) / sqrt(var + eps) + beta

MAML++ (arXiv:1810.09502, section 4) adds BNRS, running statistics for each inner step, and BNWB, gamma and
beta for each inner step: tensors _RC, whose row is chosen by the step.

torch's own operator has wrong second derivatives under vectorised transforms (pytorch/functorch#534), and its
two modes, training and evaluation, do not cover the three choices of `Statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

EPS = 1e-5  # torch's default, which the published MAML++ code uses
MOMENTUM = 0.1  # weight of the newest statistics in the running ones; also that of the published code

Params = dict[str, Tensor]


class Statistics(Enum):
    """The mean and variance that normalise a set of examples; the values are those of --bn."""

    OWN = "transductive"  # the set's own: the prediction for one query depends on the other queries
    RUNNING = "running"  # accumulated during training
    SUPPORT = "support"  # those of the task's support set, passed through the same weights


@dataclass
class NormPass:
    """Batch norm for one forward pass: the rows and statistics it uses, and the statistics it computes."""

    params: Mapping[str, Tensor]  # "norm1.weight", "norm1.bias" -> _RC; R = inner steps with BNWB, else 1
    running: Mapping[str, Tensor]  # "norm1.mean", "norm1.var" -> _RC; R = inner steps with BNRS, else 1
    step: int  # inner step, counted from 0; steps beyond the last row use the last row
    statistics: Statistics = Statistics.OWN
    support_examples: int = 0  # with Statistics.SUPPORT: how many leading examples are the support set
    keys_T: Tensor | None = None  # a random number of each task, for dropout; None: no dropout
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> mean_TC, unbiased var_TC

    def __call__(self, name: str, x_ETCHW: Tensor, fast: Mapping[str, Tensor], eps: float = EPS) -> Tensor:
        """Normalise, scale and shift one layer's input.

        Args:
            name: the layer, such as "norm1".
            x_ETCHW: its input.
            fast: the fast weights; they contain gamma and beta if the inner loop adapts them.
            eps: added to the variance.

        Returns:
            The output, _ETCHW.
        """
        gamma, beta = (part[..., None, None] for part in self.affine(name, fast))
        if self.statistics is Statistics.RUNNING:
            mean = self.row(f"{name}.mean")[:, None, None]
            var = self.row(f"{name}.var")[:, None, None]
        else:
            measured = x_ETCHW[: self.support_examples] if self.statistics is Statistics.SUPPORT else x_ETCHW
            var, mean = torch.var_mean(measured, dim=(0, 3, 4), correction=0, keepdim=True)
            count = measured.shape[0] * measured.shape[3] * measured.shape[4]
            # As in torch: normalise by the biased variance, accumulate the unbiased one.
            var_TC = unbiased(var.detach()[0, :, :, 0, 0], count)
            self.saw(name, mean.detach()[0, :, :, 0, 0], var_TC, count)
        return (x_ETCHW - mean) * (gamma * (var + eps).rsqrt()) + beta

    def affine(self, name: str, fast: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return gamma and beta of a layer: _TC if the inner loop adapts them, else this step's row _C."""
        if f"{name}.weight" in fast:
            return fast[f"{name}.weight"], fast[f"{name}.bias"]
        return self.row(f"{name}.weight"), self.row(f"{name}.bias")

    def row(self, name: str) -> Tensor:
        """Return this step's row of "norm1.weight", "norm1.bias", "norm1.mean" or "norm1.var" -> _C."""
        rows_RC = self.params[name] if name in self.params else self.running[name]
        return rows_RC[min(self.step, rows_RC.shape[0] - 1)]

    def saw(self, name: str, mean_TC: Tensor, var_TC: Tensor, count: float) -> None:
        """Record the statistics of a layer, for the running ones.

        Args:
            name: the layer.
            mean_TC: the mean of each task and channel.
            var_TC: the unbiased variance of each task and channel.
            count: the number of values behind each of them.
        """
        self.seen[name] = mean_TC, var_TC


def unbiased(var: Tensor, count: int) -> Tensor:
    """Return the unbiased variance for a biased one of `count` values."""
    return var * (count / max(count - 1, 1))


def accumulate(running: Params, passes: list[NormPass]) -> None:
    """Update the running statistics in place, once per meta-step.

    Each row moves towards the mean over all tasks and passes that used it,
    row = (1 - MOMENTUM) row + MOMENTUM mean, so the result does not depend on how tasks are divided into
    passes. Rows that no pass used keep their values.

    Args:
        running: the running statistics, _RC.
        passes: the training passes of a meta-step.
    """
    for (rows, channels), keys in _by_shape(running).items():
        used = _by_row(passes, rows)
        runs: list[list[int]] = []
        for row in used:
            if runs and row == runs[-1][-1] + 1 and len(used[row]) == len(used[runs[-1][0]]):
                runs[-1].append(row)
            else:
                runs.append([row])
        # Tensors of one shape share their operations, and so do neighbouring rows with as many passes.
        for run in runs:
            seen = [
                norm_pass.seen[layer][0 if kind == "mean" else 1]
                for layer, kind in (key.rsplit(".", 1) for key in keys)
                for row in run
                for norm_pass in used[row]
            ]
            means_KRC = torch.cat(seen).view(len(keys), len(run), -1, channels).mean(2)
            rows_KRC = [running[key][run[0] : run[-1] + 1] for key in keys]
            torch._foreach_lerp_(rows_KRC, means_KRC.unbind(), MOMENTUM)


def mean_passes(running: Mapping[str, Tensor], passes: Sequence[NormPass]) -> list[NormPass]:
    """Reduce training passes to one for each row, with the mean over the tasks and passes that used it.

    `accumulate` computes the same from both, up to rounding.

    Args:
        running: the running statistics, _RC.
        passes: the training passes of a meta-step.
    """
    rows = min((len(tensor) for tensor in running.values()), default=0)
    reduced = []
    for row, using in _by_row(passes if rows else (), rows).items():
        means = {}
        for layer in using[0].seen:
            pairs = [norm_pass.seen[layer] for norm_pass in using]
            mean, var = (torch.cat(parts).mean(0, keepdim=True) for parts in zip(*pairs, strict=True))
            means[layer] = mean, var
        reduced.append(NormPass({}, {}, row, seen=means))
    return reduced


def _by_row(passes: Sequence[NormPass], rows: int) -> dict[int, list[NormPass]]:
    """Group passes by the row that they use, in the order of the rows."""
    used: dict[int, list[NormPass]] = {}
    for norm_pass in passes:
        used.setdefault(min(norm_pass.step, rows - 1), []).append(norm_pass)
    return dict(sorted(used.items()))


def _by_shape(tensors: Mapping[str, Tensor]) -> dict[torch.Size, list[str]]:
    """Group names by the shape of their tensors."""
    names: dict[torch.Size, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.shape, []).append(name)
    return names


def init_params(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Return weights of 1 and biases of 0 for every norm layer.

    Args:
        layers: the number of channels of each layer, by name.
        rows: R, the number of inner steps with parameters of their own.
        like: a tensor of the device and dtype to use.
    """
    weights = {f"{name}.weight": like.new_ones(rows, channels) for name, channels in layers.items()}
    return weights | {f"{name}.bias": like.new_zeros(rows, channels) for name, channels in layers.items()}


def init_running(layers: Mapping[str, int], rows: int, like: Tensor) -> Params:
    """Return running means of 0 and variances of 1; arguments as in `init_params`."""
    means = {f"{name}.mean": like.new_zeros(rows, channels) for name, channels in layers.items()}
    return means | {f"{name}.var": like.new_ones(rows, channels) for name, channels in layers.items()}
