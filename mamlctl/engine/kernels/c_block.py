"""The block of `block.py` in C for CPUs, with fewer passes over memory than torch operations.

Without a C compiler torch operations do the same work, more slowly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.block import (
    BlockGradient,
    BlockSettings,
    ChannelRow,
    Planes,
    Statistics_X,
    of_all_tasks,
)
from mamlctl.engine.kernels.c_library import call, shape_of
from mamlctl.engine.nets.batch_norm import unbiased

VEC = 16  # the multiple that filters of the first block are padded to: PAD of c/first.c


def prepare(x: Tensor, tasks: int, measured: int | None) -> Planes:
    """Compute the planes and patch moments of a set, once for all inner steps.

    Args:
        x: the images, [E, T * C, H, W].
        tasks: T.
        measured: how many leading examples the moments come from; None for all.
    """
    examples, channels, height, width = x.shape
    inputs = channels // tasks
    planes = F.pad(x.view(examples, tasks, inputs, height, width), (1, 1, 1, 1)).contiguous()
    count = examples if measured is None else measured
    shape = shape_of(x, 0, count, tasks)
    mean_TD1 = torch.empty(tasks, 9 * inputs, 1, dtype=torch.float64)
    covariance_TDD = torch.empty(tasks, 9 * inputs, 9 * inputs, dtype=torch.float64)
    call(x.dtype, "patch_sums", shape, planes, mean_TD1, covariance_TDD)
    mean_TD1 /= count * height * width
    covariance_TDD /= count * height * width
    covariance_TDD -= mean_TD1 @ mean_TD1.transpose(1, 2)  # cov(q) = <q q^T> - <q> <q>^T
    return Planes(planes, mean_TD1, covariance_TDD)


class NativeTape:
    """A block in which c/block.c computes all between the convolutions; implements `block.BlockTape`.

    Tensors are channels last, in the dtype of the products.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> None:
        """Compute the forward pass; arguments as in `block.MakeBlock`."""
        self.settings, self.type = settings, gamma_X.dtype
        self.stored = settings.compute or self.type
        self.x, self.weight = x, weight
        examples, _, height, width = x.shape
        channels = len(weight)
        measured = examples if settings.measured is None else settings.measured
        if settings.statistics is not None:
            measured = 0  # the functions then use the statistics in `d`
        self.count = measured * height * width
        self.shape = shape_of(x, channels, measured, settings.groups, settings.leak)
        self.d = torch.empty(len(ChannelRow), channels, dtype=torch.float64)
        self.d[ChannelRow.GAMMA], self.d[ChannelRow.BETA] = (
            of_all_tasks(values, channels) for values in (gamma_X, beta_X)
        )
        if settings.statistics is not None:
            self.d[ChannelRow.MEAN], self.d[ChannelRow.VAR] = settings.statistics
        self.partial = torch.empty(examples, 2, channels, dtype=torch.float64)  # sums over each example
        self.pooled = examples, channels, height // 2, width // 2
        self.out = self._empty()
        if not settings.forward_only:
            # p, and the place in its window, 0 to 3, that each of its values comes from
            self.p, self.where = self._empty(), self._empty(torch.uint8)
        self._forward()

    def _forward(self) -> None:
        self.x, self.weight = self.x.to(self.stored), self.weight.to(self.stored)
        conv = self.settings.make_conv(self.weight, self.settings.groups)
        c = conv(self.x)
        if self.settings.forward_only:
            self._call("forward_only", c, self.out)
            return
        self.conv, self.c = conv, c
        self._call("forward", c, self.p, self.where, self.out)

    @property
    def seen(self) -> Statistics_X:
        mean, var = self._of_norm(ChannelRow.MEAN, ChannelRow.VAR)
        return mean, unbiased(var, self.count)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        self._call("backward", ga, self.p, self.where, self.c, gc)
        gx, weight = self.conv.backward(gc, self.x)
        if keep:
            self.ga, self.gc = ga, gc
        return BlockGradient(gx, weight.to(self.type), *self._of_norm(ChannelRow.G, ChannelRow.B))

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        assert x_t is not None  # only the image has no tangent, and the first block is another class
        self.x_t = x_t
        self.c_t, other = self.conv.tangent(self.x, x_t, weight_t.to(self.stored))
        self.p_t, a_t = self._empty(), self._empty()
        # Adds `other` to c_t in place.
        self._call("tangent", self.c_t, other, self.c, self.p, self.where, self.p_t, a_t)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        pooled = ga_t.to(self.stored), other, self.ga, self.p, self.p_t, self.where
        self._call("tangent_backward", *pooled, self.c, self.c_t)
        gc_t = self.c_t  # overwritten
        gx_t, gx_2, weight_t = self.conv.tangent_backward(gc_t, self.x, self.gc, self.x_t)
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(gx_t, weight_t.to(self.type), *by_norm, gx_2)

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        # All functions of c/block.c end with these two arguments.
        call(self.stored, name, self.shape, *tensors, self.d, self.partial)

    def _of_norm(self, one: ChannelRow, other: ChannelRow) -> tuple[Tensor, Tensor]:
        """Return two rows of `d` in the dtype of batch norm."""
        return self.d[one].to(self.type), self.d[other].to(self.type)

    def _empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate a pooled tensor."""
        return torch.empty(self.pooled, dtype=dtype or self.stored, memory_format=torch.channels_last)


class NativeFirstTape(NativeTape):
    """The first block, including its convolution. Its output c, the largest tensor, is never stored.

    Let w be a filter (D = 9 C values) and q a 3x3 patch of the image, so that c = w . q. With <q> the mean
    and cov(q) the covariance of the patches, which never change,

        mean = w . <q>        var = w . cov(q) w

    The gradient of w is the sum over all patches of gc q. With gc from `block.py`, the part of it that does
    not come from the selected places is

        slope sum c q + offset sum q = M slope cov(q) w - s b <q>

    because sum c q = M (cov(q) + <q> <q>^T) w, sum q = M <q> and M offset = -s b - M slope mean. Tangents
    follow by the product rule, with var_t = 2 w_t . cov(q) w.
    """

    def _forward(self) -> None:
        assert self.settings.planes is not None
        self.planes = self.settings.planes
        weight_TDO = self._by_patch(self.weight)
        self.along_TDO = self.planes.covariance_TDD @ weight_TDO  # cov(q) w
        if self.shape.measured:
            self.d[ChannelRow.MEAN] = _inner(self.planes.mean_TD1, weight_TDO)
            # Rounding can make the variance of a constant image negative.
            self.d[ChannelRow.VAR] = _inner(self.along_TDO, weight_TDO).clamp_(min=0)
        weights = self._padded(weight_TDO)
        if self.settings.forward_only:
            self._call("first_forward_only", weights, self.out, self.d)
        else:
            self._call("first_forward", weights, self.p, self.where, self.out, self.d)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        self.ga, gw = ga.to(self.stored), self._empty_padded()
        self._call("first_backward", self.ga, self.p, self.where, self.d, self.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        # `gw` is the part of the gradient that comes from the selected places; this is the other part.
        statistics_TDO = self.count * slope * self.along_TDO - s * b * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G, ChannelRow.B)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        weight_TDO = self._by_patch(weight_t)
        self.along_t_TDO = self.planes.covariance_TDD @ weight_TDO
        self.d[ChannelRow.MEAN_T] = _inner(self.planes.mean_TD1, weight_TDO)
        self.d[ChannelRow.S_T] = 2 * _inner(self.along_TDO, weight_TDO)  # var_t; first_tangent makes it s_t
        self.p_t, a_t = self._empty(), self._empty()
        self._call("first_tangent", self._padded(weight_TDO), self.p, self.where, self.p_t, a_t, self.d)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t, gw = ga_t.to(self.stored), self._empty_padded()
        pooled = ga_t, other, self.ga, self.p, self.p_t, self.where
        self._call("first_tangent_backward", *pooled, self.d, self.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        s_t, slope_t, b_t = (self._d_row(row) for row in (ChannelRow.S_T, ChannelRow.SLOPE_T, ChannelRow.B_T))
        # The tangent of M slope cov(q) w - s b <q>.
        statistics_TDO = self.count * (slope_t * self.along_TDO + slope * self.along_t_TDO)
        statistics_TDO -= (s_t * b + s * b_t) * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        # These functions of c/first.c all begin with the planes.
        call(self.stored, name, self.shape, self.planes.x, *tensors)

    def _d_row(self, row: ChannelRow) -> Tensor:
        """Return a row of `d` as _T1O, to be multiplied with _TDO."""
        return self.d[row].view(self.settings.groups, 1, -1)

    def _by_patch(self, weight: Tensor) -> Tensor:
        """Reshape filters [X, C, 3, 3] to _TDO, in float64 because statistics are computed from them."""
        patch = self.shape.inputs * 9
        return weight.double().view(self.settings.groups, -1, patch).transpose(1, 2)

    def _by_filter(self, gw: Tensor, statistics_TDO: Tensor) -> Tensor:
        """Add both parts of the filters' gradient -> [X, C, 3, 3] in the dtype of batch norm."""
        gw_TDO = gw[:, :, : statistics_TDO.shape[2]] + statistics_TDO
        return gw_TDO.transpose(1, 2).reshape(-1, self.shape.inputs, 3, 3).to(self.type)

    def _padded(self, weight_TDO: Tensor) -> Tensor:
        """Append filters of zeros up to a multiple of VEC."""
        filters = weight_TDO.shape[2]
        return F.pad(weight_TDO, (0, -filters % VEC)).to(self.type).contiguous()

    def _empty_padded(self) -> Tensor:
        """Allocate the gradient of padded filters."""
        shape, tasks = self.shape, self.settings.groups
        filters = shape.channels // tasks
        return torch.empty(tasks, shape.inputs * 9, filters + -filters % VEC, dtype=self.type)


def _inner(a_TDO: Tensor, b_TDO: Tensor) -> Tensor:
    """Compute the inner product over the patch axis D -> _X."""
    return (a_TDO * b_TDO).sum(1).flatten()


def native_block(
    x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
) -> NativeTape:
    """Compute a block's forward pass in C; arguments as in `block.MakeBlock`."""
    tape = NativeFirstTape if settings.first else NativeTape
    return tape(x, weight, gamma_X, beta_X, settings)
