"""The interface of networks, which are functions of their weights, and the parts that they share.

Every weight has a leading task axis, so one call computes the network of each task with its own weights.

Names of tensors end with their shape, one letter per axis:
T tasks, N ways, K shots, Q queries per class, E examples in a set (N*K or N*Q), I inner steps,
R rows of per-step norm parameters (I or 1), L parameter tensors, D input size, F features, C H W image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.literals import Activation, BatchNorm, BatchNormMode, Metric, TaskType
from mamlctl.engine.nets.batch_norm import NormPass, Params

LEAK = 0.01  # negative slope of the leaky ReLU in the published MAML++ code
SLOPES: dict[Activation, float] = {"leaky_relu": LEAK, "relu": 0.0}
HEAD = ("linear.weight", "linear.bias")  # the last layer of every network; all other weights are its body


def body_of(weights: Mapping[str, Tensor]) -> Params:
    """Return all weights except the head's."""
    return {name: weight for name, weight in weights.items() if name not in HEAD}


def cross_entropy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[y] over each task's examples -> loss_T (arXiv:1703.03400, equation 3)."""
    return F.cross_entropy(logits_TEN.flatten(0, 1), y_TE.flatten(), reduction="none").view_as(y_TE).mean(1)


def accuracy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Fraction of each task's examples whose correct class has the largest score -> _T, 0..1."""
    return (logits_TEN.argmax(-1) == y_TE).to(logits_TEN.dtype).mean(1)


def squared_error(outputs_TEN: Tensor, y: Tensor) -> Tensor:
    """Mean of (output - y)^2 over each task's examples and the N targets -> loss_T.

    It is equation 2 of arXiv:1703.03400, averaged. The values are y_TEN, or y_TE of a single target.
    """
    return (outputs_TEN - y.view_as(outputs_TEN)).square().flatten(1).mean(1)


Loss = Callable[[Tensor, Tensor], Tensor]  # outputs_TEN, y_TE -> loss_T


@dataclass(frozen=True)
class Objective:
    """The loss that trains a network and the score that evaluates it, both per task."""

    metric: Metric  # name of the score: accuracy (0..1, higher is better), mse (lower is better) or return
    loss: Loss
    score: Callable[[Tensor, Tensor], Tensor]  # outputs_TEN, y_TE -> score_T

    @property
    def has_classes(self) -> bool:
        """Whether examples have classes, not values."""
        return self.metric == "accuracy"

    @property
    def has_default_loss(self) -> bool:
        """Whether the loss is that of CLASSIFICATION or REGRESSION, or of policies, which have no other."""
        return self in (CLASSIFICATION, REGRESSION) or self.metric == "return"


CLASSIFICATION = Objective("accuracy", cross_entropy, accuracy)
REGRESSION = Objective("mse", squared_error, squared_error)


def objective_of(example_shape: Sequence[int], task_type: TaskType | None = None) -> Objective:
    """The objective with the default loss, by the kind of the user's tasks or by the shape of examples.

    Other data are images C, H, W to classify, or points of D values with targets.
    """
    is_regression = len(example_shape) == 1 if task_type is None else task_type == "regression"
    return REGRESSION if is_regression else CLASSIFICATION


class Net(Protocol):
    """A network; its inputs are images x_TECHW, or points x_TED of regression."""

    @property
    def outputs(self) -> int:
        """The number of outputs N: classes, or the targets of regression (1 for curves)."""

    @property
    def objective(self) -> Objective:
        """The loss and the score."""

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype of the convolutions' products; None for that of the weights."""

    @property
    def norm_layers(self) -> dict[str, int]:
        """The number of channels of each batch-norm layer, by name; empty without batch norm."""

    @property
    def largest(self) -> int:
        """The number of elements per example in the largest tensor of a forward pass."""

    @property
    def places(self) -> int:
        """The number of pixels of the last feature map: 0 if the image is too small, 1 without maps."""

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw the initial weights, without a task axis and identical on every device."""

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        """Pass the examples through the body -> f_TEF, the inputs of the head.

        Args:
            fast: the weights, each with the leading axis T; the head's may be absent.
            x: the examples, x_TECHW or x_TED.
            norm: batch norm of this pass, which records the statistics it computes.
        """

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        """Pass the examples through the whole network -> outputs_TEN; arguments as in `features`."""


def with_outputs(net: Net, outputs: int) -> Net:
    """Return the same network with another number of outputs."""
    return replace(net, outputs=outputs)  # type: ignore[type-var]  # every network is a frozen dataclass


def bn_mode(net: Net, bn: BatchNorm) -> BatchNormMode:
    """Return the batch-norm mode to report: the setting `bn`, or "none" without batch norm."""
    return bn if net.norm_layers else "none"


def head(fast: Mapping[str, Tensor], f_TEF: Tensor) -> Tensor:
    """Apply each task's linear layer, W f + b -> outputs_TEN."""
    return torch.baddbmm(fast["linear.bias"].unsqueeze(1), f_TEF, fast["linear.weight"].transpose(1, 2))


@dataclass(frozen=True)
class HeadNet:
    """A network that consists of the head only; its inputs are the features f_TEF."""

    outputs: int
    objective: Objective = CLASSIFICATION
    compute: torch.dtype | None = None

    largest = places = 1

    @property
    def norm_layers(self) -> dict[str, int]:
        return {}

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Return no weights: they are taken from another network."""
        return {}

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return x

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return head(fast, x)


def task_conv(x_ETCHW: Tensor, weight_TOCHW: Tensor, compute: torch.dtype | None, stride: int = 1) -> Tensor:
    """Convolve each task's examples with its own weights, padded to keep the size at stride 1.

    Args:
        x_ETCHW: the inputs; the task axis is second, so that tasks become groups of one convolution.
        weight_TOCHW: square filters of odd size, O for each task.
        compute: the dtype of the products; None for that of `x_ETCHW`.
        stride: 1, or 2 to halve the maps.

    Returns:
        The outputs _ETOHW in the dtype of `x_ETCHW`.
    """
    examples, tasks, channels, height, width = x_ETCHW.shape
    outputs, size = weight_TOCHW.shape[1], weight_TOCHW.shape[-1]
    x, weight = x_ETCHW.reshape(examples, tasks * channels, height, width), weight_TOCHW.flatten(0, 1)
    if compute is not None:
        x, weight = x.to(compute), weight.to(compute)
    out = F.conv2d(x, weight, stride=stride, padding=size // 2, groups=tasks)
    return out.to(x_ETCHW.dtype).view(examples, tasks, outputs, *out.shape[-2:])


def max_pool(x_ETCHW: Tensor) -> Tensor:
    """Apply 2x2 max-pooling; an odd last row or column is dropped."""
    pooled = F.max_pool2d(x_ETCHW.flatten(0, 1), 2)
    return pooled.view(x_ETCHW.shape[:3] + pooled.shape[-2:])


def xavier_uniform(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw U(-b, b) with b = sqrt(6 / (inputs + outputs)), variance 2 / (inputs + outputs).

    Glorot & Bengio 2010, equation 16; a convolution counts its kernel size in both numbers.

    Args:
        shape: outputs, inputs and, for a convolution, the kernel size.
        generator: the source of random numbers.
        dtype: of the result.
    """
    receptive = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
    # Drawn in float64, so that float32 and float64 runs start from the same weights.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) * bound).to(dtype)
