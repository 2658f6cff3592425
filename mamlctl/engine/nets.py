"""Networks as functions of their weights; every weight leads with the task axis.

Shapes live in the names, one letter an axis:
T tasks, N ways, K shots, Q queries per class, E examples in a set (N*K or N*Q), I inner steps,
R rows of per-step norm parameters (I or 1), L parameter tensors, D input size, F features, C H W image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.norms import NormPass, Params

LEAK = 0.01  # negative slope of the published code's leaky ReLU


def cross_entropy(logits_TEN: Tensor, y_TE: Tensor) -> Tensor:
    """Mean over a task's examples; one loss per task, so that tasks stay independent -> loss_T."""
    return F.cross_entropy(logits_TEN.flatten(0, 1), y_TE.flatten(), reduction="none").view_as(y_TE).mean(1)


def task_conv(x_ETCHW: Tensor, weight_TOCHW: Tensor, compute: torch.dtype | None) -> Tensor:
    """3x3 convolution, padding 1, of every task with its own weights -> _ETOHW, in x's type.

    `compute` is the type of the products; None leaves it as it is.
    """
    examples, tasks, channels, height, width = x_ETCHW.shape
    outputs = weight_TOCHW.shape[1]
    x, weight = x_ETCHW.reshape(examples, tasks * channels, height, width), weight_TOCHW.flatten(0, 1)
    if compute is not None:
        x, weight = x.to(compute), weight.to(compute)
    out = F.conv2d(x, weight, padding=1, groups=tasks)
    return out.to(x_ETCHW.dtype).view(examples, tasks, outputs, height, width)


@dataclass(frozen=True)
class Conv4:
    """Four times convolution, batch norm, leaky ReLU, 2x2 max-pool; then a linear head.

    The convolutions have no bias: batch norm subtracts it again (the published code carries 4 x filters such
    numbers, and learning rates for them, whose gradients are 0).
    """

    image_shape: tuple[int, int, int]  # C, H, W
    ways: int
    filters: int
    compute: torch.dtype | None = None  # type of the convolutions' products; None: that of the weights

    blocks = 4

    @property
    def norm_layers(self) -> dict[str, int]:
        """Norm layer -> channels."""
        return {f"norm{block}": self.filters for block in range(1, self.blocks + 1)}

    @property
    def features(self) -> int:
        """Inputs of the linear head."""
        _, height, width = self.image_shape
        return self.filters * (height >> self.blocks) * (width >> self.blocks)

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Xavier-uniform weights and zero biases, as in the published code; the same for every device."""
        params: Params = {}
        channels = self.image_shape[0]
        for block in range(1, self.blocks + 1):
            shape = (self.filters, channels, 3, 3)
            params[f"conv{block}.weight"] = _xavier_uniform(shape, generator, dtype)
            channels = self.filters
        params["linear.weight"] = _xavier_uniform((self.ways, self.features), generator, dtype)
        params["linear.bias"] = torch.zeros(self.ways, dtype=dtype)
        return params

    def __call__(self, fast: Mapping[str, Tensor], x_TECHW: Tensor, norm: NormPass) -> Tensor:
        """Class scores of every example under its task's weights -> logits_TEN."""
        x_ETCHW = x_TECHW.transpose(0, 1)
        for block in range(1, self.blocks + 1):
            c_ETCHW = task_conv(x_ETCHW, fast[f"conv{block}.weight"], self.compute)
            a_ETCHW = F.leaky_relu(norm(f"norm{block}", c_ETCHW), LEAK)
            pooled = F.max_pool2d(a_ETCHW.flatten(0, 1), 2)
            x_ETCHW = pooled.view(a_ETCHW.shape[:3] + pooled.shape[-2:])
        f_TEF = x_ETCHW.flatten(2).transpose(0, 1)
        return torch.baddbmm(fast["linear.bias"].unsqueeze(1), f_TEF, fast["linear.weight"].transpose(1, 2))


def _xavier_uniform(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    receptive = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
    # Drawn in float64 so that float32 and float64 runs start from the same numbers.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) * bound).to(dtype)


Net = Conv4
NETS: dict[str, Callable[..., Net]] = {"conv4": Conv4}
