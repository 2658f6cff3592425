"""ResNet-12, the larger network that few-shot papers commonly use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.nets.base import CLASSIFICATION, Objective, head, max_pool, task_conv
from mamlctl.engine.nets.batch_norm import NormPass, Params

LEAK = 0.1  # negative slope in the published code of Lee et al. 2019 (MetaOptNet)
GROWTH = (1, 2.5, 5, 10)  # block widths relative to the first: 64, 160, 320, 640 as published


@dataclass(frozen=True)
class ResNet12:
    """Four residual blocks of three 3x3 convolutions, then a mean over pixels and a linear head.

    Lee et al. 2019 (arXiv:1904.03758), without DropBlock. With n_i a convolution and its batch norm, and
    n_skip one of size 1x1, a block is max-pool(act(n_3(act(n_2(act(n_1(x))))) + n_skip(x))). The convolutions
    have no bias, because batch norm subtracts it again.
    """

    image_shape: tuple[int, int, int]  # C, H, W
    outputs: int
    filters: int  # width of the first block; 64 as published
    compute: torch.dtype | None = None
    objective: Objective = CLASSIFICATION

    def _convolutions(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield name, input channels, output channels and kernel size of every convolution."""
        inputs = self.image_shape[0]
        for block, growth in enumerate(GROWTH, 1):
            width = int(self.filters * growth)
            for layer in (1, 2, 3):
                yield f"{block}.{layer}", inputs if layer == 1 else width, width, 3
            yield f"{block}.skip", inputs, width, 1
            inputs = width

    @property
    def norm_layers(self) -> dict[str, int]:
        return {f"norm{name}": width for name, _, width, _ in self._convolutions()}

    @property
    def largest(self) -> int:
        # A map of the first block: a later block has up to 2.5 times the width, but a quarter of the pixels.
        return self.filters * math.prod(self.image_shape[1:])

    @property
    def places(self) -> int:
        return math.prod(side >> len(GROWTH) for side in self.image_shape[1:])

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw convolutions N(0, 2 / ((1 + LEAK^2) fan_out)) and a head U(-b, b), b = 1 / sqrt(inputs).

        The convolutions follow He et al. 2015 (arXiv:1502.01852, section 2.2) in its backward form, as in the
        published code; the head is torch's default for a linear layer.
        """
        params: Params = {}
        width = 0
        for name, inputs, width, size in self._convolutions():
            drawn = torch.randn(width, inputs, size, size, generator=generator, dtype=torch.float64)
            deviation = math.sqrt(2 / (1 + LEAK**2) / (width * size * size))
            params[f"conv{name}.weight"] = (drawn * deviation).to(dtype)
        uniform = torch.rand(self.outputs, width, generator=generator, dtype=torch.float64)
        params["linear.weight"] = ((2 * uniform - 1) / math.sqrt(width)).to(dtype)
        params["linear.bias"] = torch.zeros(self.outputs, dtype=dtype)
        return params

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        x_ETCHW = x.transpose(0, 1)

        def normed(name: str, x_ETCHW: Tensor) -> Tensor:
            return norm(f"norm{name}", task_conv(x_ETCHW, fast[f"conv{name}.weight"], self.compute), fast)

        for block in range(1, len(GROWTH) + 1):
            inner = x_ETCHW
            for layer in (1, 2):
                inner = F.leaky_relu(normed(f"{block}.{layer}", inner), LEAK)
            both = normed(f"{block}.3", inner) + normed(f"{block}.skip", x_ETCHW)
            x_ETCHW = max_pool(F.leaky_relu(both, LEAK))
        return x_ETCHW.mean((3, 4)).transpose(0, 1)

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return head(fast, self.features(fast, x, norm))
