"""A block of convolution, batch norm, activation and max-pooling, with hand-written derivatives.

Task and channel share an axis of length X = T * C, and a convolution in T groups gives each task its own
weights. Of one channel, with c the output of the convolution, M its number of values (examples x height x
width) and p the values of c that max-pooling selects, the forward pass is

    mean = sum c / M        var = sum c^2 / M - mean^2        r = 1 / sqrt(var + eps)        s = gamma r
    z = gamma r (p - mean) + beta = s p + (beta - s mean)        a = act(z)

Pooling c in place of a is exact for gamma > 0, since normalisation and activation are then non-decreasing,
and it leaves a quarter of the values to normalise. For gamma < 0 the sign is folded into the filter, because
-W with -gamma is the same block (the kernels select the smallest c instead). At gamma = 0 all places of a
window tie: the gradient of gamma then comes from the largest c, where pooling a would select the first place.

Backward, from ga = dL/da (a prefix g denotes the gradient of the loss), with sums over pooled values:

    gz = act'(z) ga        dL/dbeta = b = sum gz        dL/dgamma = G = r (sum gz p - mean b)
    gc = s gz at the selected places + slope c + offset at all places
         slope = -s r G / M        offset = -s b / M - slope mean

The first term of gc is the path through p. The others are the paths through mean, -s b / M for each value,
and through var, -s r G (c - mean) / M for each value, because dL/dr = gamma G / r, dr/dvar = -r^3 / 2 and
dvar/dc = 2 (c - mean) / M.

A Hessian-vector product takes the tangents (suffix _t) of all these formulas along a direction of input and
filter, with gamma and beta fixed. Forward, by the product and chain rules,

    c_t = conv(x_t, W) + conv(x, W_t)        mean_t = sum c_t / M
    var_t = 2 (sum c c_t / M - mean mean_t)        r_t = -r^3 var_t / 2        s_t = gamma r_t
    z_t = s (p_t - mean_t) + s_t (p - mean)        a_t = act'(z) z_t

and of the backward pass, with act'' = 0 and s r_t = s_t r,

    gz_t = act'(z) ga_t        b_t = sum gz_t
    G_t = r_t (sum gz p - mean b) + r (sum (gz_t p + gz p_t) - mean b_t - mean_t b)
    slope_t = -(2 s_t r G + s r G_t) / M        offset_t = -(s_t b + s b_t) / M - slope_t mean - slope mean_t
    gc_t = s gz_t + s_t gz at the selected places + slope_t c + slope c_t + offset_t at all places

The gradient of the input is the transposed convolution of gc with W, that of the filter the correlation of
gc with x. Their tangents follow by the product rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.convolutions import Direct, MakeConvolution, conv, conv_backward
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS, unbiased

Statistics_X = tuple[Tensor, Tensor]  # mean and biased variance of each channel


class ChannelRow(IntEnum):
    """The rows of `d`, the tensor [rows, X] in float64 in which the kernels keep the values of each channel.

    In the letters above and in the order of c/common.h; PRODUCT is sum gz p.
    """

    MEAN = 0
    VAR = 1
    GAMMA = 2
    BETA = 3
    R = 4
    S = 5
    B = 6
    PRODUCT = 7
    G = 8
    SLOPE = 9
    OFFSET = 10
    MEAN_T = 11
    R_T = 12
    S_T = 13
    B_T = 14
    G_T = 15
    SLOPE_T = 16
    OFFSET_T = 17


@dataclass(frozen=True)
class Planes:
    """The images of a set as kernels of the first block read them, and the moments of their 3x3 patches."""

    x: Tensor  # padded by zeros, [E, T, C, H + 2, W + 2]
    mean_TD1: Tensor  # mean of each task's patches, D = 9 C values; float64
    covariance_TDD: Tensor  # their covariance; float64


@dataclass(frozen=True)
class BlockSettings:
    """The parameters of a block other than its tensors."""

    groups: int  # T, the number of tasks
    compute: torch.dtype | None  # dtype of the convolutions' products; None for that of the weight
    first: bool  # whether the input is the image, which needs no gradient
    statistics: Statistics_X | None = None  # running statistics; None for those of the output c
    measured: int | None = None  # how many leading examples the statistics come from; None for all
    leak: float = LEAK  # slope of the activation below 0
    make_conv: MakeConvolution = Direct  # the convolution; TorchTape does not read it
    planes: Planes | None = None  # of the first block's input; TorchTape does not read them
    forward_only: bool = False  # whether only the output is needed; the tape then has no derivatives


@dataclass
class BlockGradient:
    """The gradients of one block, or their tangents."""

    x: Tensor | None  # of the input; None for the first block
    weight: Tensor  # of the filters, in the dtype of batch norm
    gamma_X: Tensor
    beta_X: Tensor
    # A second summand of `x`, or None. The kernels in C of the next block add both while they read them,
    # which saves a pass over memory.
    x_2: Tensor | None = None


class BlockTape(Protocol):
    """The intermediate results of a block's forward pass, from which its derivatives are computed."""

    @property
    def out(self) -> Tensor:
        """The block's output a, [E, X, H/2, W/2]."""

    @property
    def seen(self) -> Statistics_X:
        """Mean and unbiased variance of c, as `NormPass.seen` has them."""

    @property
    def count(self) -> float:
        """M, the number of values per channel behind them."""

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        """Compute the gradients of input, filters and norm from ga = dL/da.

        `keep` the intermediate results that the two methods below need.
        """

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        """Compute a_t, the tangent of the output, along `x_t` (None for 0) and `weight_t`."""

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        """Compute the tangents of the gradients along the direction of the last call of `tangent`.

        The tangent of ga is `ga_t` + `other`.
        """


class MakeBlock(Protocol):
    """The forward pass of a block, in one implementation."""

    def __call__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> BlockTape:
        """Compute the forward pass.

        Args:
            x: the input, [E, T * C_in, H, W], channels last.
            weight: the filters, [X, C_in, 3, 3].
            gamma_X: batch norm's weight of each channel, or one per channel of a task, which all tasks share.
            beta_X: batch norm's bias, in the same shape.
            settings: everything else.
        """


class TorchTape:
    """The block in torch operations, for any device and dtype: the reference for the kernels."""

    def __init__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> None:
        """Compute the forward pass; arguments as in `MakeBlock`."""
        self.x, self.weight, self.settings = x, weight, settings
        gamma_X, beta_X = (of_all_tasks(values, len(weight)) for values in (gamma_X, beta_X))
        # Fold the sign of gamma into the filter. So in this class c, mean and gamma are those of the folded
        # block, and mean, dL/dgamma and dL/dW are multiplied by the sign on their way out.
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
        self.var = var
        self.r = (var + EPS).rsqrt()
        self.s = _channel(gamma_X) * self.sign * self.r
        self.p, self.where = F.max_pool2d(c, 2, return_indices=True)
        z = torch.addcmul(_channel(beta_X) - self.s * mean, self.p, self.s)  # (beta - s mean) + s p
        self.c, self.mean, self.positive = c, mean, z > 0
        self.out = F.leaky_relu(z, settings.leak)

    @property
    def seen(self) -> Statistics_X:
        return (self.mean * self.sign).flatten(), unbiased(self.var.flatten(), self.count)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        gz = self._activated(ga)
        beta, product = _sum(gz), _sum(gz * self.p)  # b = dL/dbeta, and sum gz p
        gamma = self.r * (product - self.mean * beta)  # G = dL/dgamma
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
        self.mean_t = _sum(c_t) / self.count
        var_t = 2 * (_sum(self.c * c_t) / self.count - self.mean * self.mean_t)
        self.r_t = -0.5 * self.r**3 * var_t
        self.s_t = self.s * self.r_t / self.r  # gamma r_t
        # Max-pooling keeps selecting the same places, so p_t is c_t there.
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
            # The other summands of the product rule, both from one call: the input gradient from gc and W_t,
            # the filter gradient from gc and x_t.
            gx_2, weight_2 = self._conv_backward(self.gc, self.x_t, self.folded_t, True)
            assert gx_2 is not None
            gx_t, weight_t = gx_t + gx_2, weight_t + weight_2
        return self._gradient(gx_t, weight_t, gamma_t, beta_t)

    def _gradient(self, gx: Tensor | None, weight: Tensor, gamma: Tensor, beta: Tensor) -> BlockGradient:
        weight = weight.to(self.sign.dtype) * self.sign.view(-1, 1, 1, 1)
        return BlockGradient(gx, weight, (gamma * self.sign).flatten(), beta.flatten())

    def _activated(self, change: Tensor) -> Tensor:
        """Multiply by act'(z), the slope of the activation."""
        return torch.where(self.positive, change, change * self.settings.leak)

    def _scatter(self, values: Tensor, onto: Tensor) -> Tensor:
        """Add pooled values at the selected places; windows do not overlap, so the places are distinct."""
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


def of_all_tasks(values: Tensor, channels: int) -> Tensor:
    """Repeat batch norm's weights or biases if all tasks share them -> _X, with X = `channels`."""
    return values if len(values) == channels else values.repeat(channels // len(values))


def _channel(values_X: Tensor) -> Tensor:
    return values_X.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), keepdim=True)
