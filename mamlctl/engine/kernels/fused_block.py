"""The block of `block.py` from kernels that fuse all operations between two convolutions.

The kernels are written in C for CPUs (`c_block.py`) and in Triton for CUDA devices (`triton/block.py`), with
the same arithmetic on the same tensors. Tensors are [E, X, H, W], channels last, in the dtype of the
products. The values of one channel, such as its mean, are a column of `d`, in float64.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, Statistics_X, of_all_tasks
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS, unbiased


class ChannelRow(IntEnum):
    """The rows of `d`, in the letters of `block.py` and in the order of c/common.h; PRODUCT is sum gz p."""

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


class BlockShape(ctypes.Structure):
    """The struct `shape` of c/common.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("examples", "height", "width", "channels")),
        *((name, ctypes.c_int) for name in ("threads", "measured", "tasks", "inputs")),
        ("eps", ctypes.c_double),
        ("leak", ctypes.c_double),
    ]


def shape_of(x: Tensor, channels: int, measured: int, tasks: int, leak: float = LEAK) -> BlockShape:
    """Describe a block for the kernels.

    Args:
        x: the input, [E, T * C_in, H, W].
        channels: X, the number of output channels of all tasks.
        measured: how many leading examples the statistics come from.
        tasks: T.
        leak: the slope of the activation below 0.
    """
    examples, inputs, height, width = x.shape
    sizes = examples, height, width, channels, torch.get_num_threads(), measured, tasks, inputs // tasks
    return BlockShape(*sizes, EPS, leak)


@dataclass(frozen=True)
class BlockMemory:
    """The tensors that all kernels of a block read and write."""

    shape: BlockShape
    p: Tensor  # pooled values of c
    where: Tensor  # the place in its window, 0 to 3, that each of them comes from; uint8
    d: Tensor  # [rows of `ChannelRow`, X]; float64
    partial: Tensor  # buffer for partial sums, [rows, 2, X]; float64


@dataclass(frozen=True)
class TangentTensors:
    """The tensors that `Kernels.tangent_backward` reads, in the letters of `block.py`."""

    ga_t: Tensor
    other: Tensor | None  # second summand of ga_t
    ga: Tensor
    p_t: Tensor
    c: Tensor
    c_t: Tensor  # overwritten with gc_t


class Kernels(Protocol):
    """The operations between two convolutions, in the letters of `block.py`.

    All tensors are contiguous (channels last). Outputs are written in place, into the tensors that a method
    names and into `BlockMemory`.
    """

    def partial_rows(self, shape: BlockShape) -> int:
        """Return the number of rows of `BlockMemory.partial`."""

    def forward(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        """Compute p, `where`, the statistics and out = a from c.

        Args:
            block: receives p, `where` and the statistics.
            c: the output of the convolution, [E, X, H, W].
            out: receives a, the output of the block, [E, X, H // 2, W // 2].
        """

    def forward_only(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        """Compute the statistics and out as `forward` does, without p and `where`; arguments as there."""

    def backward(self, block: BlockMemory, ga: Tensor, c: Tensor, gc: Tensor) -> None:
        """Compute gc, G and b from ga.

        Args:
            block: what `forward` wrote; receives G and b.
            ga: the gradient of a.
            c: as in `forward`.
            gc: receives the gradient of c.
        """

    def tangent(
        self, block: BlockMemory, c_t: Tensor, other: Tensor | None, c: Tensor, p_t: Tensor, a_t: Tensor
    ) -> None:
        """Add `other` to c_t, and compute p_t and a_t from it.

        Args:
            block: what `forward` wrote.
            c_t: the tangent of c; `other` is added to it in place.
            other: the second summand of c_t, or None.
            c: as in `forward`.
            p_t: receives the tangent of p.
            a_t: receives the tangent of a.
        """

    def tangent_backward(self, block: BlockMemory, tensors: TangentTensors) -> None:
        """Compute gc_t, in place of c_t, and G_t and b_t from ga_t + other."""


class KernelTape:
    """A block with kernels for norm, activation and pooling, and the convolutions of `convolutions.py`."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        gamma_X: Tensor,
        beta_X: Tensor,
        settings: BlockSettings,
        kernels: Kernels,
    ) -> None:
        """Compute the forward pass; arguments as in `block.MakeBlock`, and the kernels to use.

        The kernels must store tensors in the dtype of the products.
        """
        self.settings, self.kernels, self.type = settings, kernels, gamma_X.dtype
        self.stored = settings.compute or self.type
        self.x, self.weight = x, weight
        examples, _, height, width = x.shape
        channels = len(weight)
        measured = examples if settings.measured is None else settings.measured
        if settings.statistics is not None:
            measured = 0  # the kernels then use the statistics in `d`
        self.count = measured * height * width
        shape = shape_of(x, channels, measured, settings.groups, settings.leak)
        d = torch.empty(len(ChannelRow), channels, dtype=torch.float64, device=x.device)
        d[ChannelRow.GAMMA], d[ChannelRow.BETA] = (of_all_tasks(v, channels) for v in (gamma_X, beta_X))
        if settings.statistics is not None:
            d[ChannelRow.MEAN], d[ChannelRow.VAR] = settings.statistics
        rows = kernels.partial_rows(shape)
        partial = torch.empty(rows, 2, channels, dtype=torch.float64, device=x.device)
        self.pooled = examples, channels, height // 2, width // 2
        self.out = self._empty()
        if settings.forward_only:
            p, where = self.out, torch.empty(0, dtype=torch.uint8, device=x.device)  # neither is used
        else:
            p, where = self._empty(), self._empty(torch.uint8)
        self.block = BlockMemory(shape, p, where, d, partial)
        self._forward()

    def _forward(self) -> None:
        self.x, self.weight = self.x.to(self.stored), self.weight.to(self.stored)
        conv = self.settings.make_conv(self.weight, self.settings.groups)
        c = conv(self.x)
        if self.settings.forward_only:
            self.kernels.forward_only(self.block, c, self.out)
            return
        self.conv, self.c = conv, c
        self.kernels.forward(self.block, c, self.out)

    @property
    def seen(self) -> Statistics_X:
        mean, var = self._of_norm(ChannelRow.MEAN, ChannelRow.VAR)
        return mean, unbiased(var, self.count)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        self.kernels.backward(self.block, ga, self.c, gc)
        gx, weight = self.conv.backward(gc, self.x)
        if keep:
            self.ga, self.gc = ga, gc
        return BlockGradient(gx, weight.to(self.type), *self._of_norm(ChannelRow.G, ChannelRow.B))

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        assert x_t is not None  # only the image has no tangent, and the first block is another class
        self.x_t = x_t
        self.c_t, other = self.conv.tangent(self.x, x_t, weight_t.to(self.stored))
        self.p_t, a_t = self._empty(), self._empty()
        self.kernels.tangent(self.block, self.c_t, other, self.c, self.p_t, a_t)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        tensors = TangentTensors(ga_t.to(self.stored), other, self.ga, self.p_t, self.c, self.c_t)
        self.kernels.tangent_backward(self.block, tensors)
        gx_t, gx_2, weight_t = self.conv.tangent_backward(self.c_t, self.x, self.gc, self.x_t)
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(gx_t, weight_t.to(self.type), *by_norm, gx_2)

    def _of_norm(self, one: ChannelRow, other: ChannelRow) -> tuple[Tensor, Tensor]:
        """Return two rows of `d` in the dtype of batch norm."""
        return self.block.d[one].to(self.type), self.block.d[other].to(self.type)

    def _empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate a pooled tensor."""
        layout = torch.channels_last
        return torch.empty(
            self.pooled, dtype=dtype or self.stored, device=self.x.device, memory_format=layout
        )
