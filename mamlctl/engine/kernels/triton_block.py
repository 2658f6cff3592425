"""Blocks on a CUDA device, their kernels in Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mamlctl.engine.kernels import triton_kernels as programs
from mamlctl.engine.kernels.fused_block import BlockShape, KernelTape

CHANNELS = 128  # that a program takes; not measured

TILE = {"RS": 64, "BX": 32}  # in which partial sums are joined; not measured


@dataclass(frozen=True)
class Triton:
    """The kernels of `triton_kernels.py`; `kernels.Kernels`."""

    real: Any  # Triton's type of the arithmetic

    def partial_rows(self, shape: BlockShape) -> int:
        """Sums are joined by row of pooling windows."""
        return int(shape.examples * ((shape.height + 1) // 2))

    def forward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        c, p, where, out, d, partial = tensors
        count, rows = _behind(shape)
        self._windows(programs.pool, shape, c, p, where, d, partial)
        self._channels(programs.statistics, shape, d, partial, rows, count, shape.eps)
        self._pooled(programs.activate, shape, p, out, d)

    def backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        ga, p, where, c, gc, d, partial = tensors
        self._rows(programs.backward_sums, shape, ga, p, d, partial)
        self._channels(programs.backward_numbers, shape, d, partial, _pooled_rows(shape), _behind(shape)[0])
        self._windows(programs.backward_spread, shape, ga, p, where, c, gc, d, shape.leak)

    def tangent(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        c_t, other, c, p, where, p_t, a_t, d, partial = tensors
        count, rows = _behind(shape)
        two = {"TWO": other is not None}
        self._windows(programs.tangent_pool, shape, c_t, other, c, where, p_t, partial, **two)
        self._channels(programs.tangent_numbers, shape, d, partial, rows, count)
        self._pooled(programs.tangent_activate, shape, p, p_t, a_t, d)

    def tangent_backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        ga_t, other, ga, p, p_t, where, c, c_t, d, partial = tensors
        two = {"TWO": other is not None}
        self._rows(programs.tangent_sums, shape, ga_t, other, ga, p, p_t, d, partial, **two)
        numbers = _pooled_rows(shape), _behind(shape)[0]
        self._channels(programs.tangent_backward_numbers, shape, d, partial, *numbers)
        parts = ga_t, other, ga, p, where, c, c_t
        self._windows(programs.tangent_spread, shape, *parts, d, shape.leak, **two)

    def _windows(self, program: Any, shape: BlockShape, *arguments: Any, **more: Any) -> None:
        """One program a row of pooling windows, the odd last row too."""
        sizes = shape.height, shape.width, shape.channels
        self._run(program, self.partial_rows(shape), shape.channels, *arguments, *sizes, **more)

    def _rows(self, program: Any, shape: BlockShape, *arguments: Any, **more: Any) -> None:
        """One program a row of pooled values."""
        sizes = shape.leak, shape.width // 2, shape.channels
        self._run(program, _pooled_rows(shape), shape.channels, *arguments, *sizes, **more)

    def _pooled(self, program: Any, shape: BlockShape, *arguments: Any) -> None:
        """One program some pooled values."""
        total = _pooled_rows(shape) * (shape.width // 2) * shape.channels
        programs_ = -(-total // CHANNELS)
        self._run(program, programs_, CHANNELS, *arguments, shape.leak, total, shape.channels)

    def _run(self, program: Any, count: int, channels: int, *arguments: Any, **more: Any) -> None:
        program[(count, -(-channels // CHANNELS))](*arguments, REAL=self.real, BX=CHANNELS, **more)

    def _channels(self, program: Any, shape: BlockShape, *arguments: Any) -> None:
        """One program some channels."""
        program[(1, -(-shape.channels // TILE["BX"]))](*arguments, shape.channels, **TILE)


def _behind(shape: BlockShape) -> tuple[float, int]:
    """Values a channel behind the statistics, and rows of partial sums that hold them."""
    return (
        float(shape.measured * shape.height * shape.width),
        shape.measured * ((shape.height + 1) // 2),
    )


def _pooled_rows(shape: BlockShape) -> int:
    return int(shape.examples * (shape.height // 2))


def triton_block(x: Tensor, weight: Tensor, *args: Any, **settings: Any) -> KernelTape:
    """A block with Triton's kernels: `blocks.TorchTape`'s arguments."""
    real = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return KernelTape(x, weight, *args, kernels=Triton(real), **settings)
