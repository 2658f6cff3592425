"""Blocks of `block.py` from a few kernels that fuse what lies between two convolutions.

The kernels are C on a CPU (`c_block.py`) and Triton on a CUDA device (`triton_block.py`): the same arithmetic
on the same memory. Tensors are channels last, [E, X, H, W] in torch's words, in the type of the products;
what a kernel knows of a channel is a column of `d`, in float64.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, Statistics_X
from mamlctl.engine.kernels.convolutions import conv, conv_backward
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS


class ChannelRow(IntEnum):
    """The rows of `d`; the letters are those of `block.py`, and the order that of c/common.h."""

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
    """`shape` of c/common.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("examples", "height", "width", "channels")),
        *((name, ctypes.c_int) for name in ("threads", "measured", "tasks", "inputs")),
        ("eps", ctypes.c_double),
        ("leak", ctypes.c_double),
    ]


def shape_of(x: Tensor, channels: int, measured: int, tasks: int, leak: float = LEAK) -> BlockShape:
    """The shape of a block: its input, channels behind it, and examples that its statistics come from."""
    examples, inputs, height, width = x.shape
    sizes = examples, height, width, channels, torch.get_num_threads(), measured, tasks, inputs // tasks
    return BlockShape(*sizes, EPS, leak)


@dataclass(frozen=True)
class BlockMemory:
    """What all kernels of a block read and write."""

    shape: BlockShape
    p: Tensor  # pooled values
    where: Tensor  # which place of its window each one was taken from; uint8
    d: Tensor  # a column for each channel, its rows `ChannelRow`; float64
    partial: Tensor  # room for sums of parts; float64


@dataclass(frozen=True)
class TangentTensors:
    """What the way back of a tangent reads, in the letters of `block.py`."""

    ga_t: Tensor
    other: Tensor | None  # to be added to ga_t
    ga: Tensor
    p_t: Tensor
    c: Tensor
    c_t: Tensor  # which becomes gc_t


class Kernels(Protocol):
    """What lies between two convolutions; letters as in `block.py`.

    Every tensor is whole, and outputs are written in place: those named, and what `BlockMemory` has of them.
    """

    def partial_rows(self, shape: BlockShape) -> int:
        """How many rows of sums they want room for."""

    def forward(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        """From c to p, where, statistics and out."""

    def backward(self, block: BlockMemory, ga: Tensor, c: Tensor, gc: Tensor) -> None:
        """From ga to gc, and the gradients by the norm."""

    def tangent(
        self, block: BlockMemory, c_t: Tensor, other: Tensor | None, c: Tensor, p_t: Tensor, a_t: Tensor
    ) -> None:
        """From c_t + `other`, which c_t becomes, to p_t and a_t."""

    def tangent_backward(self, block: BlockMemory, tensors: TangentTensors) -> None:
        """From ga_t + other to gc_t, in the place of c_t, and the change of the gradients by the norm."""


class KernelTape:
    """A block whose norm, activation and pooling are kernels; the convolutions are `convolutions.py`'s."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        gamma_X: Tensor,
        beta_X: Tensor,
        settings: BlockSettings,
        kernels: Kernels,
    ) -> None:
        """Forward. Arguments are those of `block.MakeBlock`; `kernels`: for the type of the products."""
        self.settings, self.kernels, self.type = settings, kernels, weight.dtype
        self.stored = settings.compute or weight.dtype
        self.x, self.weight = x, weight
        examples, _, height, width = x.shape
        channels = len(gamma_X)
        measured = examples if settings.measured is None else settings.measured
        if settings.statistics is not None:
            measured = 0  # nothing is to be measured
        self.count = measured * height * width
        shape = shape_of(x, channels, measured, settings.groups, settings.leak)
        d = torch.empty(len(ChannelRow), channels, dtype=torch.float64, device=x.device)
        d[ChannelRow.GAMMA], d[ChannelRow.BETA] = gamma_X, beta_X
        if settings.statistics is not None:
            d[ChannelRow.MEAN], d[ChannelRow.VAR] = settings.statistics
        rows = kernels.partial_rows(shape)
        partial = torch.empty(rows, 2, channels, dtype=torch.float64, device=x.device)
        self.pooled = examples, channels, height // 2, width // 2
        self.block = BlockMemory(shape, self._empty(), self._empty(torch.uint8), d, partial)
        self.out = self._empty()
        self._forward()

    def _forward(self) -> None:
        self.x, self.weight = self.x.to(self.stored), self.weight.to(self.stored)
        self.c = conv(self.x, self.weight, self.settings.groups)
        self.kernels.forward(self.block, self.c, self.out)

    @property
    def statistics(self) -> Statistics_X:
        """Mean and biased variance a channel."""
        return self._of_norm(ChannelRow.MEAN, ChannelRow.VAR)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        self.kernels.backward(self.block, ga, self.c, gc)
        gx, weight = self._conv_backward(gc, self.x, self.weight)
        if keep:
            self.ga, self.gc = ga, gc
        return BlockGradient(gx, weight.to(self.type), *self._of_norm(ChannelRow.G, ChannelRow.B))

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        self.x_t, self.weight_t = x_t, weight_t.to(self.stored)
        self.c_t = conv(self.x, self.weight_t, self.settings.groups)
        other = None if x_t is None else conv(x_t, self.weight, self.settings.groups)
        self.p_t, a_t = self._empty(), self._empty()
        self.kernels.tangent(self.block, self.c_t, other, self.c, self.p_t, a_t)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        tensors = TangentTensors(ga_t.to(self.stored), other, self.ga, self.p_t, self.c, self.c_t)
        self.kernels.tangent_backward(self.block, tensors)
        gx_t, weight_t = self._conv_backward(self.c_t, self.x, self.weight)
        gx_2 = None
        if self.x_t is not None:
            # Both cross terms from one call: its input gradient is by x_t, its weight gradient by weight_t.
            gx_2, weight_2 = self._conv_backward(self.gc, self.x_t, self.weight_t)
            weight_t = weight_t + weight_2
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(gx_t, weight_t.to(self.type), *by_norm, gx_2)

    def _conv_backward(self, gc: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        return conv_backward(gc, x, weight, self.settings.groups, by_input=not self.settings.first)

    def _of_norm(self, one: ChannelRow, other: ChannelRow) -> tuple[Tensor, Tensor]:
        """Two rows of `d` in the type of the norm."""
        return self.block.d[one].to(self.type), self.block.d[other].to(self.type)

    def _empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a pooled tensor."""
        layout = torch.channels_last
        return torch.empty(
            self.pooled, dtype=dtype or self.stored, device=self.x.device, memory_format=layout
        )
