"""Convolution, batch norm, leaky ReLU and 2x2 max-pool as one block, its derivatives by hand.

Every function here is plain tensor arithmetic without autograd; `c_block.py` has the same four in C.
Task and channel are one axis, X = T * C, and a convolution in T groups gives every task its own weights.

Max-pool commutes with what follows the convolution where the norm's weight is not negative: so the sign of a
negative weight is folded into the convolution, the raw output is pooled, and only the quarter that is left
is normalised and activated. The statistics are still those of the whole output. For a weight of exactly 0 all
places of a window tie: the first of them gives the weight's gradient there, the largest output's here.

Letters, all of one channel: c the convolution's output, p its pooled values, mean and r = 1/sqrt(var + eps)
its statistics, M the number of values behind them, n = (p - mean) r, z = gamma n + beta, s = gamma r;
a prefix g is the loss's gradient by the letter, a suffix _t the tangent along a direction of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.convolutions import conv, conv_backward
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS

Statistics_X = tuple[Tensor, Tensor]  # mean and biased variance


@dataclass(frozen=True)
class Planes:
    """What a first block in C wants of a set: padded planes, and the patches' first two moments by task."""

    x: Tensor  # [E, T, C, H + 2, W + 2]
    mean_TD1: Tensor  # D = 9 C numbers a patch; float64
    covariance_TDD: Tensor


@dataclass(frozen=True)
class BlockSettings:
    """What a block is made for, besides its tensors."""

    groups: int  # tasks
    compute: torch.dtype | None  # type of the convolutions' products; None: that of the weight
    first: bool  # whether the input is the image, whose gradient nobody asks for
    statistics: Statistics_X | None = None  # stored ones; None: those of the output itself
    measured: int | None = None  # how many leading examples give the statistics; None: all
    leak: float = LEAK  # the activation's slope below 0
    planes: Planes | None = None  # of the first block's input, for arithmetic that prepares them


@dataclass
class BlockGradient:
    """Gradients of one block; `x` is None where nobody asked."""

    x: Tensor | None
    weight: Tensor  # like the block's weight, in the type of the norm
    gamma_X: Tensor
    beta_X: Tensor
    x_2: Tensor | None = None  # to be added to `x`, left to the next block, which reads both


class BlockTape(Protocol):
    """One block's forward pass over one set, which its derivatives go on from."""

    @property
    def out(self) -> Tensor:
        """The block's output."""

    @property
    def statistics(self) -> Statistics_X:
        """Those of the convolution's output."""

    @property
    def count(self) -> int:
        """Values a channel behind the statistics."""

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        """Gradients by input, weight and norm, from the output's; `keep` what the two below need."""

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        """The output's change along a change of the input (None: none) and of the weight."""

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        """The gradients' change along the same, `ga_t` + `other` being that of the output's gradient."""


class MakeBlock(Protocol):
    """A block's forward pass, in some arithmetic."""

    def __call__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> BlockTape:
        """`x`: [E, X_in, H, W], channels last. `weight`: [X, C_in, 3, 3]."""


class TorchTape:
    """The block in torch's own operations: any device, any type."""

    def __init__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> None:
        """Forward; arguments are those of `MakeBlock`."""
        self.x, self.weight, self.settings = x, weight, settings
        self.sign = torch.where(gamma_X < 0, -1.0, 1.0).to(gamma_X).view(1, -1, 1, 1)
        self.folded = weight * self.sign.view(-1, 1, 1, 1)
        c = self._conv(x, self.folded)
        measured = c[: settings.measured]
        if settings.statistics is not None:
            mean, var = (_channel(values) for values in settings.statistics)
            mean = mean * self.sign
        else:
            var, mean = torch.var_mean(measured, dim=(0, 2, 3), correction=0, keepdim=True)
        self.count = measured.numel() // c.shape[1]
        self.statistics = (mean * self.sign).flatten(), var.flatten()
        self.r = (var + EPS).rsqrt()
        self.s = _channel(gamma_X) * self.sign * self.r
        self.p, self.where = F.max_pool2d(c, 2, return_indices=True)
        # z = s p + (beta - s mean)
        z = torch.addcmul(_channel(beta_X) - self.s * mean, self.p, self.s)
        self.c, self.mean, self.positive = c, mean, z > 0
        self.out = F.leaky_relu(z, settings.leak)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        gz = self._activated(ga)
        beta, product = _sum(gz), _sum(gz * self.p)
        gamma = self.r * (product - self.mean * beta)
        # Through mean and var every value counts: offset + slope c, beside s gz at the pooled places.
        slope = -self.s * self.r * gamma / self.count
        offset = -self.s * beta / self.count - slope * self.mean
        gc = self._scatter(self.s * gz, torch.addcmul(offset, self.c, slope))
        gx, weight = self._conv_backward(gc, self.x, self.folded, not self.settings.first)
        if keep:
            self.gz, self.gc, self.beta, self.gamma, self.product = gz, gc, beta, gamma, product
            self.slope = slope
        return self._gradient(gx, weight, gamma, beta)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        self.x_t, self.folded_t = x_t, weight_t * self.sign.view(-1, 1, 1, 1)
        c_t = self._conv(self.x, self.folded_t)
        if x_t is not None:
            c_t = c_t + self._conv(x_t, self.folded)
        # The tangents of mean, of var = <c^2> - mean^2, and of r = 1/sqrt(var + eps).
        self.mean_t = _sum(c_t) / self.count
        var_t = 2 * (_sum(self.c * c_t) / self.count - self.mean * self.mean_t)
        self.r_t = -0.5 * self.r**3 * var_t
        self.s_t = self.s * self.r_t / self.r
        self.p_t = c_t.flatten(2).gather(2, self.where.flatten(2)).view_as(self.p)
        z_t = self.s * (self.p_t - self.mean_t) + self.s_t * (self.p - self.mean)
        self.c_t = c_t
        return self._activated(z_t)

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t = ga_t if other is None else ga_t + other
        gz_t, r, r_t = self._activated(ga_t), self.r, self.r_t
        beta_t = _sum(gz_t)
        product_t = _sum(gz_t * self.p) + _sum(self.gz * self.p_t)
        centre, centre_t = self.product - self.mean * self.beta, self.mean * beta_t + self.mean_t * self.beta
        gamma_t = r_t * centre + r * (product_t - centre_t)
        slope_t = -(2 * self.s_t * r * self.gamma + self.s * r * gamma_t) / self.count
        offset_t = (
            -(self.s_t * self.beta + self.s * beta_t) / self.count
            - slope_t * self.mean
            - self.slope * self.mean_t
        )
        spread = torch.addcmul(torch.addcmul(offset_t, self.c, slope_t), self.c_t, self.slope)
        gc_t = self._scatter(self.s * gz_t + self.s_t * self.gz, spread)
        gx_t, weight_t = self._conv_backward(gc_t, self.x, self.folded, not self.settings.first)
        if self.x_t is not None and gx_t is not None:
            # Both cross terms from one call: its input gradient is by x_t, its weight gradient by weight_t.
            gx_2, weight_2 = self._conv_backward(self.gc, self.x_t, self.folded_t, True)
            assert gx_2 is not None
            gx_t, weight_t = gx_t + gx_2, weight_t + weight_2
        return self._gradient(gx_t, weight_t, gamma_t, beta_t)

    def _gradient(self, gx: Tensor | None, weight: Tensor, gamma: Tensor, beta: Tensor) -> BlockGradient:
        weight = weight.to(self.weight.dtype) * self.sign.view(-1, 1, 1, 1)
        return BlockGradient(gx, weight, (gamma * self.sign).flatten(), beta.flatten())

    def _activated(self, change: Tensor) -> Tensor:
        """Times the activation's slope."""
        return torch.where(self.positive, change, change * self.settings.leak)

    def _scatter(self, values: Tensor, onto: Tensor) -> Tensor:
        """Add pooled values where they were taken from. Windows do not overlap: no place is hit twice."""
        return onto.flatten(2).scatter_add_(2, self.where.flatten(2), values.flatten(2)).view_as(onto)

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = self.settings.compute or x.dtype
        return conv(x.to(dtype), weight.to(dtype), self.settings.groups).to(x.dtype)

    def _conv_backward(
        self, gc: Tensor, x: Tensor, weight: Tensor, by_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        dtype = self.settings.compute or x.dtype
        tensors = gc.to(dtype), x.to(dtype), weight.to(dtype)
        gx, gw = conv_backward(*tensors, self.settings.groups, by_input=by_input)
        return None if gx is None else gx.to(x.dtype), gw.to(x.dtype)


def _channel(values_X: Tensor) -> Tensor:
    return values_X.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), keepdim=True)
