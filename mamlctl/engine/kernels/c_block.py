"""The block of `block.py` in C for CPUs, with fewer passes over memory than torch operations.

Without a C compiler torch operations do the same work, more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, Planes
from mamlctl.engine.kernels.c_library import call
from mamlctl.engine.kernels.fused_block import (
    BlockMemory,
    BlockShape,
    ChannelRow,
    KernelTape,
    TangentTensors,
    shape_of,
)

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


@dataclass(frozen=True)
class Native:
    """The kernels of c/block.c for tensors stored in one dtype; implements `fused_block.Kernels`."""

    stored: torch.dtype

    def partial_rows(self, shape: BlockShape) -> int:
        return int(shape.examples)  # one partial sum for each example

    def forward(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        self._call("forward", block, c, block.p, block.where, out)

    def forward_only(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        self._call("forward_only", block, c, out)

    def backward(self, block: BlockMemory, ga: Tensor, c: Tensor, gc: Tensor) -> None:
        self._call("backward", block, ga, block.p, block.where, c, gc)

    def tangent(
        self, block: BlockMemory, c_t: Tensor, other: Tensor | None, c: Tensor, p_t: Tensor, a_t: Tensor
    ) -> None:
        self._call("tangent", block, c_t, other, c, block.p, block.where, p_t, a_t)

    def tangent_backward(self, block: BlockMemory, tensors: TangentTensors) -> None:
        t = tensors
        pooled = t.ga_t, t.other, t.ga, block.p, t.p_t, block.where
        self._call("tangent_backward", block, *pooled, t.c, t.c_t)

    def _call(self, name: str, block: BlockMemory, *tensors: Tensor | None) -> None:
        # All functions of c/block.c end with these two arguments.
        call(self.stored, name, block.shape, *tensors, block.d, block.partial)


class NativeFirstTape(KernelTape):
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
        self.planes, block = self.settings.planes, self.block
        weight_TDO = self._by_patch(self.weight)
        self.along_TDO = self.planes.covariance_TDD @ weight_TDO  # cov(q) w
        if block.shape.measured:
            block.d[ChannelRow.MEAN] = _inner(self.planes.mean_TD1, weight_TDO)
            # Rounding can make the variance of a constant image negative.
            block.d[ChannelRow.VAR] = _inner(self.along_TDO, weight_TDO).clamp_(min=0)
        weights = self._padded(weight_TDO)
        if self.settings.forward_only:
            self._call("first_forward_only", weights, self.out, block.d)
        else:
            self._call("first_forward", weights, block.p, block.where, self.out, block.d)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        self.ga, gw, block = ga.to(self.stored), self._empty_padded(), self.block
        self._call("first_backward", self.ga, block.p, block.where, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        # `gw` is the part of the gradient that comes from the selected places; this is the other part.
        statistics_TDO = self.count * slope * self.along_TDO - s * b * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G, ChannelRow.B)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        weight_TDO, block = self._by_patch(weight_t), self.block
        self.along_t_TDO = self.planes.covariance_TDD @ weight_TDO
        block.d[ChannelRow.MEAN_T] = _inner(self.planes.mean_TD1, weight_TDO)
        block.d[ChannelRow.S_T] = 2 * _inner(self.along_TDO, weight_TDO)  # var_t; first_tangent makes it s_t
        self.p_t, a_t = self._empty(), self._empty()
        self._call("first_tangent", self._padded(weight_TDO), block.p, block.where, self.p_t, a_t, block.d)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t, gw, block = ga_t.to(self.stored), self._empty_padded(), self.block
        pooled = ga_t, other, self.ga, block.p, self.p_t, block.where
        self._call("first_tangent_backward", *pooled, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        s_t, slope_t, b_t = (self._d_row(row) for row in (ChannelRow.S_T, ChannelRow.SLOPE_T, ChannelRow.B_T))
        # The tangent of M slope cov(q) w - s b <q>.
        statistics_TDO = self.count * (slope_t * self.along_TDO + slope * self.along_t_TDO)
        statistics_TDO -= (s_t * b + s * b_t) * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        # These functions of c/first.c all begin with the planes.
        call(self.stored, name, self.block.shape, self.planes.x, *tensors)

    def _d_row(self, row: ChannelRow) -> Tensor:
        """Return a row of `d` as _T1O, to be multiplied with _TDO."""
        return self.block.d[row].view(self.settings.groups, 1, -1)

    def _by_patch(self, weight: Tensor) -> Tensor:
        """Reshape filters [X, C, 3, 3] to _TDO, in float64 because statistics are computed from them."""
        patch = self.block.shape.inputs * 9
        return weight.double().view(self.settings.groups, -1, patch).transpose(1, 2)

    def _by_filter(self, gw: Tensor, statistics_TDO: Tensor) -> Tensor:
        """Add both parts of the filters' gradient -> [X, C, 3, 3] in the dtype of batch norm."""
        gw_TDO = gw[:, :, : statistics_TDO.shape[2]] + statistics_TDO
        return gw_TDO.transpose(1, 2).reshape(-1, self.block.shape.inputs, 3, 3).to(self.type)

    def _padded(self, weight_TDO: Tensor) -> Tensor:
        """Append filters of zeros up to a multiple of VEC."""
        filters = weight_TDO.shape[2]
        return F.pad(weight_TDO, (0, -filters % VEC)).to(self.type).contiguous()

    def _empty_padded(self) -> Tensor:
        """Allocate the gradient of padded filters."""
        shape, tasks = self.block.shape, self.settings.groups
        filters = shape.channels // tasks
        return torch.empty(tasks, shape.inputs * 9, filters + -filters % VEC, dtype=self.type)


def _inner(a_TDO: Tensor, b_TDO: Tensor) -> Tensor:
    """Compute the inner product over the patch axis D -> _X."""
    return (a_TDO * b_TDO).sum(1).flatten()


def native_block(
    x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
) -> KernelTape:
    """Compute a block's forward pass in C; arguments as in `block.MakeBlock`."""
    tape = NativeFirstTape if settings.first else KernelTape
    return tape(x, weight, gamma_X, beta_X, settings, Native(settings.compute or weight.dtype))
