"""Conv4: four convolution blocks and a linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.literals import Activation, ConvName, Pooling, Readout
from mamlctl.engine.nets.base import (
    CLASSIFICATION,
    SLOPES,
    Objective,
    head,
    max_pool,
    task_conv,
    xavier_uniform,
)
from mamlctl.engine.nets.batch_norm import NormPass, Params


@dataclass(frozen=True)
class Conv4:
    """Four blocks of 3x3 convolution, batch norm, activation and 2x2 max-pooling, then a linear head.

    The network of Vinyals et al. 2016 that MAML uses (arXiv:1703.03400, section 5.2), with stride 2 in place
    of pooling if `pooling` is "stride". The convolutions have no bias, because batch norm subtracts it again.
    The published MAML++ code has these 4 x filters biases and learning rates for them; their gradients are 0.
    """

    image_shape: tuple[int, int, int]  # C, H, W
    outputs: int
    filters: int
    compute: torch.dtype | None = None
    pooling: Pooling = "max"  # or "stride": convolutions of stride 2 halve the maps
    readout: Readout = "flatten"  # or "mean" over the pixels of the last map
    activation: Activation = "leaky_relu"
    conv: ConvName = "direct"  # method of the hand-written derivatives on a CPU
    objective: Objective = CLASSIFICATION

    blocks = 4

    @property
    def norm_layers(self) -> dict[str, int]:
        return {f"norm{block}": self.filters for block in range(1, self.blocks + 1)}

    @property
    def largest(self) -> int:
        # The output of the first convolution; later maps are smaller.
        return self.filters * math.prod(self.image_shape[1:]) // (4 if self.pooling == "stride" else 1)

    @property
    def features_shape(self) -> tuple[int, int, int]:
        """C, H, W of the last block's output."""
        _, height, width = self.image_shape
        for _ in range(self.blocks):
            # A padded convolution of stride 2 rounds an odd size up; pooling rounds it down.
            up = self.pooling == "stride"
            height, width = (height + up) // 2, (width + up) // 2
        return self.filters, height, width

    @property
    def places(self) -> int:
        return math.prod(self.features_shape[1:])

    @property
    def by_hand(self) -> bool:
        """Whether derivatives/conv4.py has hand-written derivatives for this variant."""
        return self.pooling == "max" and self.readout == "flatten"

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw Xavier-uniform weights and a head bias of 0, as in the published MAML++ code."""
        params: Params = {}
        channels = self.image_shape[0]
        for block in range(1, self.blocks + 1):
            params[f"conv{block}.weight"] = xavier_uniform((self.filters, channels, 3, 3), generator, dtype)
            channels = self.filters
        features = self.filters if self.readout == "mean" else math.prod(self.features_shape)
        params["linear.weight"] = xavier_uniform((self.outputs, features), generator, dtype)
        params["linear.bias"] = torch.zeros(self.outputs, dtype=dtype)
        return params

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        x_ETCHW = x.transpose(0, 1)
        stride = 2 if self.pooling == "stride" else 1
        for block in range(1, self.blocks + 1):
            c_ETCHW = task_conv(x_ETCHW, fast[f"conv{block}.weight"], self.compute, stride)
            x_ETCHW = F.leaky_relu(norm(f"norm{block}", c_ETCHW, fast), SLOPES[self.activation])
            if stride == 1:
                x_ETCHW = max_pool(x_ETCHW)
        if self.readout == "mean":
            x_ETCHW = x_ETCHW.mean((3, 4))
        return x_ETCHW.flatten(2).transpose(0, 1)

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return head(fast, self.features(fast, x, norm))
