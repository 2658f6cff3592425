"""Networks as functions of their weights; every weight leads with the task axis.

Shapes live in the names, one letter an axis:
T tasks, N ways, K shots, Q queries per class, E examples in a set (N*K or N*Q), I inner steps,
R rows of per-step norm parameters (I or 1), L parameter tensors, D input size, F features, C H W image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.literals import Activation, BatchNorm, BatchNormMode, Metric
from mamlctl.engine.nets.batch_norm import NormPass, Params

LEAK = 0.01  # negative slope of the published code's leaky ReLU
SLOPES: dict[Activation, float] = {"leaky_relu": LEAK, "relu": 0.0}
HEAD = ("linear.weight", "linear.bias")  # every network's last layer; all else is its body


def body_of(weights: Mapping[str, Tensor]) -> Params:
    """All weights but the head's."""
    return {name: weight for name, weight in weights.items() if name not in HEAD}


def cross_entropy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Mean over a task's examples; one loss per task, so that tasks stay independent -> loss_T."""
    return F.cross_entropy(logits_TEN.flatten(0, 1), y_TE.flatten(), reduction="none").view_as(y_TE).mean(1)


def accuracy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Share of a task's examples whose class has the largest score -> _T."""
    return (logits_TEN.argmax(-1) == y_TE).to(logits_TEN.dtype).mean(1)


def squared_error(outputs_TE1: Tensor, y_TE: Tensor) -> Tensor:
    """Mean over a task's examples -> loss_T."""
    return (outputs_TE1.squeeze(-1) - y_TE).square().mean(1)


@dataclass(frozen=True)
class Objective:
    """What a network is trained for, and how it is judged; both per task."""

    metric: Metric  # of records and tables: accuracy (0..1, more is better) or mse (less is better)
    loss: Callable[[Tensor, Tensor], Tensor]  # outputs_TEN, y_TE -> loss_T
    score: Callable[[Tensor, Tensor], Tensor]  # the same -> score_T


CLASSIFICATION = Objective("accuracy", cross_entropy, accuracy)
REGRESSION = Objective("mse", squared_error, squared_error)


class Net(Protocol):
    """A network. Inputs are x_TECHW, or x_TED for curves."""

    @property
    def outputs(self) -> int:
        """Numbers of the head: classes, or 1 for curves."""

    @property
    def objective(self) -> Objective:
        """What it is trained for."""

    @property
    def compute(self) -> torch.dtype | None:
        """Type of the convolutions' products; None: that of the weights."""

    @property
    def norm_layers(self) -> dict[str, int]:
        """Norm layer -> channels."""

    @property
    def largest(self) -> int:
        """Numbers an example in the largest tensor of a pass."""

    @property
    def places(self) -> int:
        """Places of the last map, of which an image too small leaves none; 1 without maps."""

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Starting weights, the same for every device; the head's are HEAD."""

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        """What the head reads, under every task's weights -> f_TEF."""

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        """Class scores or values of every example -> outputs_TEN."""


def with_outputs(net: Net, outputs: int) -> Net:
    """The same network with so many numbers of the head."""
    return replace(net, outputs=outputs)  # type: ignore[type-var]  # every network is a frozen dataclass


def bn_mode(net: Net, bn: BatchNorm) -> BatchNormMode:
    """The batch-norm mode that results name: the setting `bn`, or none without batch norm."""
    return bn if net.norm_layers else "none"


def head(fast: Mapping[str, Tensor], f_TEF: Tensor) -> Tensor:
    """The linear layer of every task -> outputs_TEN."""
    return torch.baddbmm(fast["linear.bias"].unsqueeze(1), f_TEF, fast["linear.weight"].transpose(1, 2))


@dataclass(frozen=True)
class HeadNet:
    """The head alone: a network whose inputs are features."""

    outputs: int
    objective: Objective = CLASSIFICATION
    compute: torch.dtype | None = None

    largest = places = 1

    @property
    def norm_layers(self) -> dict[str, int]:
        return {}

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Nothing: its weights are another net's."""
        return {}

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return x

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return head(fast, x)


def task_conv(x_ETCHW: Tensor, weight_TOCHW: Tensor, compute: torch.dtype | None, stride: int = 1) -> Tensor:
    """Convolution of every task with its own weights, padded to keep the size -> _ETOHW, in x's type.

    `compute` is the type of the products; None leaves it as it is.
    """
    examples, tasks, channels, height, width = x_ETCHW.shape
    outputs, size = weight_TOCHW.shape[1], weight_TOCHW.shape[-1]
    x, weight = x_ETCHW.reshape(examples, tasks * channels, height, width), weight_TOCHW.flatten(0, 1)
    if compute is not None:
        x, weight = x.to(compute), weight.to(compute)
    out = F.conv2d(x, weight, stride=stride, padding=size // 2, groups=tasks)
    return out.to(x_ETCHW.dtype).view(examples, tasks, outputs, *out.shape[-2:])


def halved(x_ETCHW: Tensor) -> Tensor:
    """2x2 max-pool."""
    pooled = F.max_pool2d(x_ETCHW.flatten(0, 1), 2)
    return pooled.view(x_ETCHW.shape[:3] + pooled.shape[-2:])


def xavier_uniform(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform weights of variance 2 / (inputs + outputs) (Glorot & Bengio 2010)."""
    receptive = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
    # Drawn in float64 so that float32 and float64 runs start from the same numbers.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) * bound).to(dtype)
