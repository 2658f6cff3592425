"""Blocks of `blocks.py` from a few kernels that fuse what lies between two convolutions.

The kernels are C on a CPU (`native.py`) and Triton on a CUDA device (`triton_block.py`): the same arithmetic
on the same memory. Tensors are channels last, [E, X, H, W] in torch's words, in the type of the products;
what a kernel knows of a channel is a column of `d`, in float64.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, Statistics_X
from mamlctl.engine.kernels.convolutions import conv, conv_backward
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS


class ChannelRow(IntEnum):
    """The rows of `d`; the letters are those of `blocks.py`, and the order that of c/common.h."""

    (
        MEAN,
        VAR,
        GAMMA,
        BETA,
        R,
        S,
        B,
        PRODUCT,
        G,
        SLOPE,
        OFFSET,
        MEAN_T,
        R_T,
        S_T,
        B_T,
        G_T,
        SLOPE_T,
        OFFSET_T,
    ) = range(18)


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


class Kernels(Protocol):
    """What lies between two convolutions. Every tensor is whole, and outputs are written in place."""

    def partial_rows(self, shape: BlockShape) -> int:
        """How many rows of sums they want room for."""

    def forward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """c -> p, where, out; then d, partial."""

    def backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """ga, p, where, c -> gc; then d, partial."""

    def tangent(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """c_t += a second part or None; c, p, where -> p_t, a_t; then d, partial."""

    def tangent_backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """ga_t + a second part or None; ga, p, p_t, where, c; c_t -> gc_t in its place; then d, partial."""


class KernelTape:
    """A block whose norm, activation and pooling are kernels; the convolutions are `convolutions.py`'s."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        gamma_X: Tensor,
        beta_X: Tensor,
        *,
        kernels: Kernels,
        leak: float = LEAK,
        groups: int,
        given: Statistics_X | None,
        measured: int | None,
        first: bool,
        extra: Any,
        compute: torch.dtype | None,
    ) -> None:
        """Forward. Arguments are those of `blocks.TorchTape`; `kernels`: for the type of the products."""
        self.kernels, self.groups, self.first, self.type = kernels, groups, first, weight.dtype
        self.stored = compute or weight.dtype
        self.x, self.weight = x, weight
        examples, _, height, width = x.shape
        channels = len(gamma_X)
        behind = 0 if given is not None else examples if measured is None else measured
        self.shape = shape_of(x, channels, behind, groups, leak)
        self.count = behind * height * width
        self.d = torch.empty(len(ChannelRow), channels, dtype=torch.float64, device=x.device)
        self.d[ChannelRow.GAMMA], self.d[ChannelRow.BETA] = gamma_X, beta_X
        if given is not None:
            self.d[ChannelRow.MEAN], self.d[ChannelRow.VAR] = given
        rows = kernels.partial_rows(self.shape)
        self.partial = torch.empty(rows, 2, channels, dtype=torch.float64, device=x.device)
        self.pooled = examples, channels, height // 2, width // 2
        self.p, self.out, self.where = self._empty(), self._empty(), self._empty(torch.uint8)
        self._forward(extra)

    def _forward(self, extra: Any) -> None:
        self.x, self.weight = self.x.to(self.stored), self.weight.to(self.stored)
        self.c = conv(self.x, self.weight, self.groups)
        outs = self.p, self.where, self.out
        self.kernels.forward(self.shape, self.c, *outs, self.d, self.partial)

    @property
    def statistics(self) -> Statistics_X:
        """Mean and biased variance a channel."""
        return self.d[ChannelRow.MEAN].to(self.type), self.d[ChannelRow.VAR].to(self.type)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        """First derivatives."""
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        parts = ga, self.p, self.where, self.c, gc
        self.kernels.backward(self.shape, *parts, self.d, self.partial)
        gx, weight = conv_backward(gc, self.x, self.weight, self.groups, by_input=not self.first)
        if keep:
            self.ga, self.gc = ga, gc
        return self._gradient(gx, weight, ChannelRow.G, ChannelRow.B)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        """Forward tangent."""
        self.x_t, self.weight_t = x_t, weight_t.to(self.stored)
        self.c_t = conv(self.x, self.weight_t, self.groups)
        other = None if x_t is None else conv(x_t, self.weight, self.groups)
        self.p_t, a_t = self._empty(), self._empty()
        parts = self.c_t, other, self.c, self.p, self.where, self.p_t, a_t
        self.kernels.tangent(self.shape, *parts, self.d, self.partial)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        """Second derivatives."""
        ga_t = ga_t.to(self.stored)
        parts = ga_t, other, self.ga, self.p, self.p_t, self.where, self.c, self.c_t
        self.kernels.tangent_backward(self.shape, *parts, self.d, self.partial)  # c_t becomes gc_t
        gc_t, by_input = self.c_t, not self.first
        gx_t, weight_t = conv_backward(gc_t, self.x, self.weight, self.groups, by_input=by_input)
        if self.x_t is None:
            return self._gradient(gx_t, weight_t, ChannelRow.G_T, ChannelRow.B_T)
        # Both cross terms from one call: its input gradient is by x_t, its weight gradient by weight_t.
        gx_2, weight_2 = conv_backward(self.gc, self.x_t, self.weight_t, self.groups, by_input=by_input)
        return self._gradient(gx_t, weight_t + weight_2, ChannelRow.G_T, ChannelRow.B_T, gx_2)

    def _gradient(
        self, gx: Tensor | None, weight: Tensor, gamma: int, beta: int, gx_2: Tensor | None = None
    ) -> BlockGradient:
        by_norm = self.d[gamma].to(self.type), self.d[beta].to(self.type)
        return BlockGradient(gx, weight.to(self.type), *by_norm, gx_2)

    def _empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a pooled tensor."""
        layout = torch.channels_last
        return torch.empty(
            self.pooled, dtype=dtype or self.stored, device=self.x.device, memory_format=layout
        )
