"""The fully connected networks of the MAML paper: for Omniglot images, for curves, and for policies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.literals import Activation, Metric
from mamlctl.engine.nets.base import SLOPES, Objective, head, xavier_uniform
from mamlctl.engine.nets.batch_norm import NormPass, Params

# Layer widths of the published networks (arXiv:1703.03400, sections 5.1 to 5.3).
HIDDEN: Mapping[Metric, str] = {"accuracy": "256-128-64-64", "mse": "40-40", "return": "100-100"}

# The logarithm of the standard deviation of each number of an action, among the weights of a policy.
DEVIATION = "deviation.log"


@dataclass(frozen=True)
class Mlp:
    """Linear layers with an activation each, then a linear head.

    For classification every layer has batch norm and no bias, which batch norm would subtract again. For
    curves every layer has a bias and no batch norm, as published.
    """

    input_shape: tuple[int, ...]
    outputs: int
    hidden: tuple[int, ...]
    objective: Objective
    activation: Activation = "relu"
    compute: torch.dtype | None = None

    places = 1

    @property
    def normed(self) -> bool:
        """Whether the network has batch norm."""
        return self.objective.has_classes

    @property
    def norm_layers(self) -> dict[str, int]:
        return {f"norm{layer}": width for layer, width in enumerate(self.hidden, 1)} if self.normed else {}

    @property
    def largest(self) -> int:
        return max(math.prod(self.input_shape), *self.hidden)

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw the initial weights.

        For classification: Xavier-uniform weights and biases of 0. For curves: U(-b, b) with
        b = 1 / sqrt(inputs) for weights and biases, torch's default for a linear layer. MAML's published
        initialisation for curves, biases of 0, places the kinks of all first-layer ReLUs at x = 0.
        """
        params: Params = {}
        inputs = math.prod(self.input_shape)
        for layer, width in enumerate(self.hidden, 1):
            if self.normed:
                params[f"hidden{layer}.weight"] = xavier_uniform((width, inputs), generator, dtype)
            else:
                params[f"hidden{layer}.weight"] = _uniform((width, inputs), inputs, generator, dtype)
                params[f"hidden{layer}.bias"] = _uniform((width,), inputs, generator, dtype)
            inputs = width
        # Drawn for curves too, where it is replaced: the later draws, and so stored results, depend on it.
        params["linear.weight"] = xavier_uniform((self.outputs, inputs), generator, dtype)
        params["linear.bias"] = torch.zeros(self.outputs, dtype=dtype)
        if not self.normed:
            params["linear.weight"] = _uniform((self.outputs, inputs), inputs, generator, dtype)
            params["linear.bias"] = _uniform((self.outputs,), inputs, generator, dtype)
        return params

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        f_TEF = x.flatten(2)
        for layer in range(1, len(self.hidden) + 1):
            weight_TFD = fast[f"hidden{layer}.weight"].transpose(1, 2)
            if self.normed:
                f_TEF = torch.bmm(f_TEF, weight_TFD)
                # Batch norm treats vectors as images of one pixel.
                f_ETF11 = norm(f"norm{layer}", f_TEF.transpose(0, 1)[..., None, None], fast)
                f_TEF = f_ETF11[..., 0, 0].transpose(0, 1)
            else:
                f_TEF = torch.baddbmm(fast[f"hidden{layer}.bias"].unsqueeze(1), f_TEF, weight_TFD)
            f_TEF = F.leaky_relu(f_TEF, SLOPES[self.activation])
        return f_TEF

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return head(fast, self.features(fast, x, norm))


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) / math.sqrt(inputs)).to(dtype)


def mean_return(outputs_TE1: Tensor, y: Tensor) -> Tensor:
    """Mean over the trajectories of each task -> return_T; the goals `y` are not used."""
    return outputs_TE1.flatten(1).mean(1)


def minus_mean_return(outputs_TE1: Tensor, y: Tensor) -> Tensor:
    """Minus `mean_return`, the loss that reports show."""
    return -mean_return(outputs_TE1, y)


# The outputs of a task are the returns of its trajectories.
POLICY = Objective("return", minus_mean_return, mean_return)


@dataclass(frozen=True)
class GaussianPolicy:
    """pi(a | s) = N(a; mu(s), diag(sigma^2)), where `mean` computes mu and sigma does not depend on s.

    Finn et al. 2017 (arXiv:1703.03400), section 5.3: two hidden layers of 100 ReLUs; the inner loop adapts
    sigma too.
    """

    mean: Mlp

    objective = POLICY

    @property
    def outputs(self) -> int:
        """A, the numbers of an action."""
        return self.mean.outputs

    @property
    def compute(self) -> torch.dtype | None:
        return self.mean.compute

    @property
    def norm_layers(self) -> dict[str, int]:
        return self.mean.norm_layers

    @property
    def largest(self) -> int:
        return self.mean.largest

    @property
    def places(self) -> int:
        return self.mean.places

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw the weights of the mean; the deviations start at 1, as in the published code."""
        return self.mean.init(generator, dtype) | {DEVIATION: torch.zeros(self.outputs, dtype=dtype)}

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return self.mean.features(fast, x, norm)

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return self.mean(fast, x, norm)
