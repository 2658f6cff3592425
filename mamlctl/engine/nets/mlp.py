"""The fully connected network: MAML's non-convolutional one for Omniglot, and the one for curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.literals import Activation
from mamlctl.engine.nets.base import CLASSIFICATION, REGRESSION, SLOPES, Objective, head, xavier_uniform
from mamlctl.engine.nets.batch_norm import NormPass, Params

# Widths of the published networks (arXiv:1703.03400, section 5.1 and appendix A.1).
HIDDEN = {CLASSIFICATION.metric: "256-128-64-64", REGRESSION.metric: "40-40"}


@dataclass(frozen=True)
class Mlp:
    """Linear layers, each with batch norm where it classifies, and an activation; then a linear head.

    Where there is batch norm the layers have no bias, which it would subtract again. For curves they have
    one, and no norm, as published.
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
        """Whether it has batch norm."""
        return self.objective is not REGRESSION

    @property
    def norm_layers(self) -> dict[str, int]:
        return {f"norm{layer}": width for layer, width in enumerate(self.hidden, 1)} if self.normed else {}

    @property
    def largest(self) -> int:
        """The input or the widest layer."""
        return max(math.prod(self.input_shape), *self.hidden)

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Xavier-uniform weights and biases of 0; for curves both uniform up to 1 / sqrt(inputs).

        That is torch's own start of a linear layer. MAML's, deviations of 0.01 and biases of 0, puts all the
        network's kinks in one place.
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
        params["linear.weight"] = xavier_uniform((self.outputs, inputs), generator, dtype)
        params["linear.bias"] = torch.zeros(self.outputs, dtype=dtype)
        if not self.normed:
            params["linear.weight"] = _uniform((self.outputs, inputs), inputs, generator, dtype)
            params["linear.bias"] = _uniform((self.outputs,), inputs, generator, dtype)
        return params

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        """The last hidden layer -> f_TEF."""
        f_TEF = x.flatten(2)
        for layer in range(1, len(self.hidden) + 1):
            weight_TFD = fast[f"hidden{layer}.weight"].transpose(1, 2)
            if self.normed:
                f_TEF = torch.bmm(f_TEF, weight_TFD)
                # A set of vectors is a set of images with one pixel each.
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
