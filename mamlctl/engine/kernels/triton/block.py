"""The block of `block.py` on CUDA devices, with kernels in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, ChannelRow, Planes, Statistics_X
from mamlctl.engine.kernels.convolutions import conv, conv_backward
from mamlctl.engine.kernels.head import HeadGradient, TorchHead
from mamlctl.engine.kernels.triton import ops
from mamlctl.engine.nets.batch_norm import EPS

LARGEST_HEAD = 1024  # examples x classes of a program, in tiles
MOST_TILES = 1 << 14  # tiles of channels in one launch
# Programs of the first block that add up gradients: twice the 132 multiprocessors of an H100; not tuned.
PROGRAMS = 264


class TritonTape:
    """A block whose operations between two convolutions are Triton kernels; implements `block.BlockTape`."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        gamma_X: Tensor,
        beta_X: Tensor,
        settings: BlockSettings,
        tickets: Tensor,
    ) -> None:
        """Compute the forward pass; arguments as in `block.MakeBlock`, and those of `TritonBlocks`."""
        self.settings, self.type, self.gamma, self.beta = settings, gamma_X.dtype, gamma_X, beta_X
        self.stored = settings.compute or self.type
        self.x, self.weight = x, weight
        examples, _, self.height, self.width = x.shape
        self.channels, self.examples = len(weight), examples
        measured = examples if settings.measured is None else settings.measured
        self.count = float(measured * self.height * self.width)
        self.d = torch.empty(len(ChannelRow), self.channels, dtype=torch.float64, device=x.device)
        # No sums of c are needed if its statistics are given.
        self.measured_rows = 0 if settings.statistics else measured * ((self.height + 1) // 2)
        if settings.statistics:
            self.d[ChannelRow.MEAN], self.d[ChannelRow.VAR] = settings.statistics
        self.moments = torch.empty(2, self.channels, dtype=self.type, device=x.device)
        self.tickets = tickets
        self.p, self.where, self.out = self._empty(), self._empty(torch.uint8), self._empty()
        self._forward()

    @property
    def seen(self) -> Statistics_X:
        return self.moments[0], self.moments[1]

    def _forward(self) -> None:
        self.x, self.weight = self.x.to(self.stored), self.weight.to(self.stored)
        self.c = conv(self.x, self.weight, self.settings.groups)
        sizes = self.height, self.width, self.channels
        self.partial = self._partial(self._windows[0], 2)
        norm = len(self.gamma), self.count, EPS
        memory = self.p, self.where, self.d, self.moments, self.partial, self.tickets
        ops.pool(*self._windows, self.c, self.gamma, self.beta, *memory, self.measured_rows, *norm, *sizes)
        ops.activate(*self._values, self.p, self.out, self.d, *self._pooled_sizes)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        ops.backward_sums(*self._rows, ga, self.p, *self._sums)
        sizes = self.settings.leak, self.height, self.width, self.channels
        ops.backward_spread(*self._windows, ga, self.p, self.where, self.c, gc, self.d, *sizes)
        gx, weight = self._conv_backward(gc, self.x, self.weight)
        if keep:
            self.ga, self.gc = ga, gc
        return BlockGradient(gx, weight, self.d[ChannelRow.G], self.d[ChannelRow.B])

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        assert x_t is not None
        self.x_t, self.weight_t = x_t.to(self.stored), weight_t.to(self.stored)
        self.c_t = conv(self.x, self.weight_t, self.settings.groups)
        other = conv(self.x_t, self.weight, self.settings.groups)
        self.p_t, a_t = self._empty(), self._empty()
        written = self.p_t, self.d, self.partial, self.tickets
        sizes = self.count, self.height, self.width, self.channels
        ops.tangent_pool(
            *self._windows, self.c_t, other, self.c, self.where, *written, self.measured_rows, *sizes
        )
        ops.tangent_activate(*self._values, self.p, self.p_t, a_t, self.d, *self._pooled_sizes)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t = ga_t.to(self.stored)
        ops.tangent_sums(*self._rows, ga_t, other, self.ga, self.p, self.p_t, *self._sums)
        sizes = self.settings.leak, self.height, self.width, self.channels
        read = ga_t, other, self.ga, self.p, self.where, self.c
        ops.tangent_spread(*self._windows, *read, self.c_t, self.d, *sizes)
        gx_t, weight_t = self._conv_backward(self.c_t, self.x, self.weight)
        # The other summands of the product rule, both from one call: the input gradient from gc and W_t, the
        # filter gradient from gc and x_t.
        gx_2, weight_2 = self._conv_backward(self.gc, self.x_t, self.weight_t)
        return BlockGradient(gx_t, weight_t + weight_2, self.d[ChannelRow.G_T], self.d[ChannelRow.B_T], gx_2)

    @property
    def _windows(self) -> tuple[int, int]:
        """A program per row of pooling windows, including an odd last row."""
        return self.examples * ((self.height + 1) // 2), _tiles(self.channels, ops.CHANNELS)

    @property
    def _rows(self) -> tuple[int, int]:
        """A program per row of pooled values."""
        return self.examples * (self.height // 2), _tiles(self.channels, ops.CHANNELS)

    @property
    def _values(self) -> tuple[int, int]:
        """A program per CHANNELS pooled values."""
        return _tiles(self.p.numel(), ops.CHANNELS), 1

    @property
    def _pooled_sizes(self) -> tuple[float, int, int]:
        return self.settings.leak, self.p.numel(), self.channels

    @property
    def _sums(self) -> tuple[Tensor | float, ...]:
        """The last arguments of the kernels that add up pooled values."""
        sizes = self._rows[0], self.count, self.settings.leak, self.width // 2, self.channels
        return self.d, self.partial, self.tickets, *sizes

    def _conv_backward(self, gc: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        return conv_backward(gc, x, weight, self.settings.groups, by_input=not self.settings.first)

    def _partial(self, programs: int, sums: int) -> Tensor:
        return torch.empty(programs, sums, self.channels, dtype=torch.float64, device=self.x.device)

    def _empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate a pooled tensor."""
        size, layout = (self.examples, self.channels, self.height // 2, self.width // 2), torch.channels_last
        return torch.empty(size, dtype=dtype or self.stored, device=self.x.device, memory_format=layout)


class TritonFirstTape(TritonTape):
    """The first block, including its convolution; c is never stored, see `first_kernels.py`."""

    def _forward(self) -> None:
        assert self.settings.planes is not None
        planes = self.settings.planes
        self.inputs = planes.x, self.weight, planes.mean_TD1, planes.covariance_TDD
        tasks, filters = self.settings.groups, self.channels // self.settings.groups
        tiles = tasks * _tiles(filters, ops.FILTERS)
        self.grid = self.examples * (self.height // 2), tiles
        self.sizes = self.settings.leak, self.height, self.width, self.channels, tasks, filters
        self.parts = max(1, min(self.grid[0], PROGRAMS // tiles))
        self.image = self.x.shape[1] // tasks
        norm = self.gamma, self.beta, self.p, self.where, self.out, self.d, self.moments
        numbers = len(self.gamma), self.count, EPS
        given = int(self.settings.statistics is not None)
        ops.first_forward(*self.grid, *self.inputs, *norm, *numbers, *self.sizes, self.image, given)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        self.ga, gw = ga.to(self.stored), torch.empty_like(self.weight)
        self.partial = self._partial(self.parts, 2 + self.inputs[2].shape[1])
        images, *others = self.inputs
        written = self.d, self.partial, self.tickets, gw
        read = images, self.ga, *others, self.p, self.where
        ops.first_backward(*self._reduction, *read, *written, *self._counts)
        return BlockGradient(None, gw, self.d[ChannelRow.G], self.d[ChannelRow.B])

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        self.weight_t, self.p_t, a_t = weight_t, self._empty(), self._empty()
        images, weight, *moments = self.inputs
        tensors = images, weight, weight_t, *moments, self.p, self.where, self.p_t, a_t, self.d
        ops.first_tangent(*self.grid, *tensors, *self.sizes, self.image)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t, gw = ga_t.to(self.stored), torch.empty_like(self.weight)
        images, weight, *moments = self.inputs
        read = images, ga_t, other, self.ga, weight, self.weight_t, *moments, self.p, self.p_t, self.where
        written = self.d, self.partial, self.tickets, gw
        ops.first_tangent_backward(*self._reduction, *read, *written, *self._counts)
        return BlockGradient(None, gw, self.d[ChannelRow.G_T], self.d[ChannelRow.B_T])

    @property
    def _reduction(self) -> tuple[int, int]:
        return self.parts, self.grid[1]

    @property
    def _counts(self) -> tuple[float, ...]:
        return self.count, *self.sizes, self.parts, self.examples, self.image


class TritonHead(TorchHead):
    """The head, with a kernel for each pass; one that is too large for a program uses torch's operations."""

    def __init__(self, a: Tensor, weight_TNF: Tensor, bias_TN: Tensor, y_TE: Tensor) -> None:
        """Compute nothing yet; arguments as in `TorchHead`."""
        super().__init__(a, weight_TNF, bias_TN, y_TE)
        tasks, self.classes, self.size = weight_TNF.shape
        examples = y_TE.shape[1]
        self.fits = ops.tile(examples) * ops.tile(self.classes) <= LARGEST_HEAD
        self.sizes = a.shape[1], a.shape[2] * a.shape[3], self.size, self.classes, examples
        self.grid = tasks, 1

    def gradient(self, *, keep: bool) -> HeadGradient:
        if not self.fits:
            return super().gradient(keep=keep)
        weight, bias, y_TE = self.weight_TNF, self.bias_TN, self.y_TE
        self.logits_TEN, self.g_TEN, self.p_TEN = weight.new_empty(3, *y_TE.shape, self.classes)
        self.loss_T, self.score_T = weight.new_empty(2, len(y_TE))
        result = HeadGradient(torch.empty_like(self.a), torch.empty_like(weight), torch.empty_like(bias))
        measured = self.logits_TEN, self.loss_T, self.score_T, self.g_TEN, self.p_TEN
        grads = result.ga, result.weight_TNF, result.bias_TN
        ops.head_gradient(*self.grid, self.a, weight, bias, y_TE, *measured, *grads, *self.sizes)
        return result

    def tangent(self, a_t: Tensor, weight_t_TNF: Tensor, bias_t_TN: Tensor) -> HeadGradient:
        if not self.fits:
            return super().tangent(a_t, weight_t_TNF, bias_t_TN)
        weight, bias = self.weight_TNF, self.bias_TN
        result = HeadGradient(torch.empty_like(self.a), torch.empty_like(weight), torch.empty_like(bias))
        read = self.a, a_t, weight, weight_t_TNF, bias_t_TN, self.g_TEN, self.p_TEN
        grads = result.ga, result.weight_TNF, result.bias_TN
        ops.head_tangent(*self.grid, *read, *grads, *self.sizes)
        return result


@dataclass(frozen=True)
class TritonBlocks:
    """The Triton blocks of one device; implements `block.MakeBlock`."""

    tickets: Tensor  # counters of 0 for the kernels, which leave them at 0; see `channels.is_last`

    @classmethod
    def on(cls, device: torch.device) -> TritonBlocks:
        return cls(torch.zeros(MOST_TILES, dtype=torch.int32, device=device))

    def __call__(
        self, x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
    ) -> TritonTape:
        tape = TritonFirstTape if settings.first else TritonTape
        return tape(x, weight, gamma_X, beta_X, settings, self.tickets)


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
    patches = planes[:measured].unfold(3, 3, 1).unfold(4, 3, 1).permute(1, 2, 5, 6, 0, 3, 4)
    # In float64, because the variances of c are small differences of these moments.
    patches_TDM = patches.reshape(tasks, 9 * inputs, -1).double()
    mean_TD1 = patches_TDM.mean(2, keepdim=True)
    covariance_TDD = patches_TDM @ patches_TDM.transpose(1, 2) / patches_TDM.shape[2]
    return Planes(planes, mean_TD1, covariance_TDD - mean_TD1 @ mean_TD1.transpose(1, 2))


def _tiles(values: int, size: int) -> int:
    return -(-values // size)
