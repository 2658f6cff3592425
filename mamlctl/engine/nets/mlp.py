"""The fully connected networks of the MAML paper: one for Omniglot images, one for curves."""

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

# Layer widths of the published networks (arXiv:1703.03400, sections 5.1 and 5.2).
HIDDEN = {CLASSIFICATION.metric: "256-128-64-64", REGRESSION.metric: "40-40"}


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
