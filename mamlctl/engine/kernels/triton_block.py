"""The block of `block.py` on CUDA devices, with kernels in Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import triton.language as tl
from torch import Tensor

from mamlctl.engine.kernels import triton_kernels as programs
from mamlctl.engine.kernels.block import BlockSettings
from mamlctl.engine.kernels.fused_block import BlockMemory, BlockShape, KernelTape, TangentTensors

CHANNELS = 128  # channels per program; not tuned
TILE = {"RS": 64, "BX": 32}  # rows and channels per tile when partial sums are added up; not tuned

Argument = Tensor | float | None


class Program(Protocol):
    """A compiled Triton function: program[grid](*pointers, *numbers) launches it."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., object]: ...


@dataclass(frozen=True)
class Triton:
    """The kernels of `triton_kernels.py`; implements `fused_block.Kernels`."""

    real: tl.dtype  # dtype of the arithmetic

    def partial_rows(self, shape: BlockShape) -> int:
        # One partial sum for each row of pooling windows, including an odd last row.
        return int(shape.examples * ((shape.height + 1) // 2))

    def forward(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        shape, d = block.shape, block.d
        self._windows(programs.pool, shape, c, block.p, block.where, d, block.partial)
        self._channels(programs.statistics, block, _measured_rows(shape), _count(shape), shape.eps)
        self._pooled(programs.activate, shape, block.p, out, d)

    def backward(self, block: BlockMemory, ga: Tensor, c: Tensor, gc: Tensor) -> None:
        shape, d = block.shape, block.d
        self._rows(programs.backward_sums, shape, ga, block.p, d, block.partial)
        self._channels(programs.backward_numbers, block, _pooled_rows(shape), _count(shape))
        self._windows(programs.backward_spread, shape, ga, block.p, block.where, c, gc, d, shape.leak)

    def tangent(
        self, block: BlockMemory, c_t: Tensor, other: Tensor | None, c: Tensor, p_t: Tensor, a_t: Tensor
    ) -> None:
        shape, two = block.shape, other is not None
        self._windows(programs.tangent_pool, shape, c_t, other, c, block.where, p_t, block.partial, TWO=two)
        self._channels(programs.tangent_numbers, block, _measured_rows(shape), _count(shape))
        self._pooled(programs.tangent_activate, shape, block.p, p_t, a_t, block.d)

    def tangent_backward(self, block: BlockMemory, tensors: TangentTensors) -> None:
        shape, d, t, two = block.shape, block.d, tensors, tensors.other is not None
        pooled = t.ga_t, t.other, t.ga, block.p
        self._rows(programs.tangent_sums, shape, *pooled, t.p_t, d, block.partial, TWO=two)
        self._channels(programs.tangent_backward_numbers, block, _pooled_rows(shape), _count(shape))
        spread = *pooled, block.where, t.c, t.c_t, d
        self._windows(programs.tangent_spread, shape, *spread, shape.leak, TWO=two)

    def _windows(self, program: Program, shape: BlockShape, *arguments: Argument, **constants: bool) -> None:
        """Launch one program per row of pooling windows, including an odd last row."""
        sizes = shape.height, shape.width, shape.channels
        self._run(program, self.partial_rows(shape), shape.channels, *arguments, *sizes, **constants)

    def _rows(self, program: Program, shape: BlockShape, *arguments: Argument, **constants: bool) -> None:
        """Launch one program per row of pooled values."""
        sizes = shape.leak, shape.width // 2, shape.channels
        self._run(program, _pooled_rows(shape), shape.channels, *arguments, *sizes, **constants)

    def _pooled(self, program: Program, shape: BlockShape, *arguments: Argument) -> None:
        """Launch one program per CHANNELS pooled values."""
        total = _pooled_rows(shape) * (shape.width // 2) * shape.channels
        count = -(-total // CHANNELS)
        self._run(program, count, CHANNELS, *arguments, shape.leak, total, shape.channels)

    def _run(
        self, program: Program, count: int, channels: int, *arguments: Argument, **constants: bool
    ) -> None:
        program[(count, -(-channels // CHANNELS))](*arguments, REAL=self.real, BX=CHANNELS, **constants)

    def _channels(self, program: Program, block: BlockMemory, *numbers: float) -> None:
        """Launch one program per tile of channels."""
        grid = 1, -(-block.shape.channels // TILE["BX"])
        program[grid](block.d, block.partial, *numbers, block.shape.channels, **TILE)


def _count(shape: BlockShape) -> float:
    """M, the number of values per channel behind the statistics."""
    return float(shape.measured * shape.height * shape.width)


def _measured_rows(shape: BlockShape) -> int:
    """The number of leading rows of partial sums that belong to the measured examples."""
    return int(shape.measured * ((shape.height + 1) // 2))


def _pooled_rows(shape: BlockShape) -> int:
    """The number of rows of pooled values."""
    return int(shape.examples * (shape.height // 2))


def triton_block(
    x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
) -> KernelTape:
    """Compute a block's forward pass with Triton kernels; arguments as in `block.MakeBlock`."""
    real = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return KernelTape(x, weight, gamma_X, beta_X, settings, Triton(real))
