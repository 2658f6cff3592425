"""The block of `block.py` on CUDA devices, with kernels in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, ChannelRow, Planes, Statistics_X
from mamlctl.engine.kernels.head import HeadGradient, TorchHead
from mamlctl.engine.kernels.triton import ops
from mamlctl.engine.kernels.triton.convolutions import Pair, convolve, filter_gradient
from mamlctl.engine.nets.batch_norm import EPS

LARGEST_HEAD = 1024  # examples x classes of a program, in tiles
# Of a launch at least, if there is work for them: four times the 132 multiprocessors of an H100.
PROGRAMS = 528
FEWEST_PARTS = 64  # programs of a tile of channels at least; the last one adds up the sums of all
MOST_GROUPS = 16  # groups of windows that a program of the first block computes


class TritonTape:
    """A block whose operations are all Triton kernels; implements `block.BlockTape`."""

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
        self.measured = 0 if settings.statistics else measured
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
        self.c = convolve(self.x, self.weight, self.settings.groups)
        tiles = _tiles(self.channels, ops.CHANNELS)
        windows = self.examples * ((self.height + 1) // 2) * ((self.width + 1) // 2)
        self.groups = _tiles(windows, ops.GROUP), tiles
        self.grid = min(self.groups[0], max(PROGRAMS // tiles, FEWEST_PARTS)), tiles
        self.sizes: tuple[float, ...] = (self.examples, self.height, self.width, self.channels)
        self.partial = self._partial(self.grid[0], 2)
        norm = len(self.gamma), self.count, EPS
        memory = self.p, self.where, self.d, self.moments, self.partial, self.tickets
        numbers = self.measured, *norm, *self.sizes
        ops.pool(*self.grid, self.c, self.gamma, self.beta, *memory, *numbers)
        ops.activate(*self._values, self.p, self.out, self.d, *self._pooled_sizes)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        ga, gc = ga.to(self.stored), torch.empty_like(self.c)
        ops.backward_sums(*self.grid, ga, self.p, *self._sums)
        read = ga, self.p, self.where, self.c
        ops.backward_spread(*self.groups, *read, gc, self.d, self.settings.leak, *self.sizes)
        gx = convolve(gc, self.weight, self.settings.groups, back=True)
        if keep:
            self.ga, self.gc = ga, gc
        return BlockGradient(gx, self._by_weight(gc, self.x), self.d[ChannelRow.G], self.d[ChannelRow.B])

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        assert x_t is not None
        self.x_t, self.weight_t = x_t.to(self.stored), weight_t.to(self.stored)
        tasks = self.settings.groups
        self.c_t = convolve(self.x, self.weight_t, tasks, (self.x_t, self.weight))
        self.p_t, a_t = self._empty(), self._empty()
        written = self.p_t, self.d, self.partial, self.tickets
        numbers = self.measured, self.count, *self.sizes
        ops.tangent_pool(*self.grid, self.c_t, self.c, self.where, *written, *numbers)
        ops.tangent_activate(*self._values, self.p, self.p_t, a_t, self.d, *self._pooled_sizes)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        assert other is None, "the gradient of the input has one summand here"
        ga_t = ga_t.to(self.stored)
        ops.tangent_sums(*self.grid, ga_t, self.ga, self.p, self.p_t, *self._sums)
        read = ga_t, self.ga, self.p, self.where, self.c
        ops.tangent_spread(*self.groups, *read, self.c_t, self.d, self.settings.leak, *self.sizes)
        gx_t = convolve(self.c_t, self.weight, self.settings.groups, (self.gc, self.weight_t), back=True)
        weight_t = self._by_weight(self.c_t, self.x, (self.gc, self.x_t))
        return BlockGradient(gx_t, weight_t, self.d[ChannelRow.G_T], self.d[ChannelRow.B_T])

    @property
    def _values(self) -> tuple[int, int]:
        """A program per VALUES pooled values."""
        return _tiles(self.p.numel(), ops.VALUES), 1

    @property
    def _pooled_sizes(self) -> tuple[float, int, int]:
        return self.settings.leak, self.p.numel(), self.channels

    @property
    def _sums(self) -> tuple[Tensor | float, ...]:
        """The last arguments of the kernels that add up pooled values."""
        items = self.p.numel() // self.channels
        numbers = self.count, self.settings.leak, items, self.channels
        return self.d, self.partial, self.tickets, *numbers

    def _by_weight(self, gc: Tensor, x: Tensor, pair: Pair | None = None) -> Tensor:
        return filter_gradient(gc, x, self.settings.groups, self.tickets, self.type, pair)

    def _partial(self, programs: int, sums: int) -> Tensor:
        return torch.empty(programs, sums, self.channels, dtype=self.type, device=self.x.device)

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
        groups = _tiles(self.examples * (self.height // 2) * (self.width // 2), ops.WINDOWS)
        self.grid = min(groups, max(PROGRAMS // tiles, _tiles(groups, MOST_GROUPS))), tiles
        shape = self.height, self.width, self.channels, tasks, filters
        self.sizes = (self.settings.leak, *shape, self.examples, self.x.shape[1] // tasks)
        norm = self.gamma, self.beta, self.p, self.where, self.out, self.d, self.moments
        numbers = len(self.gamma), self.count, EPS
        given = int(self.settings.statistics is not None)
        ops.first_forward(*self.grid, *self.inputs, *norm, *numbers, *self.sizes, given)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        self.ga, gw = ga.to(self.stored), torch.empty_like(self.weight)
        self.partial = self._partial(self.grid[0], 2 + self.inputs[2].shape[1])
        images, *others = self.inputs
        written = self.d, self.partial, self.tickets, gw
        read = images, self.ga, *others, self.p, self.where
        ops.first_backward(*self.grid, *read, *written, self.count, *self.sizes)
        return BlockGradient(None, gw, self.d[ChannelRow.G], self.d[ChannelRow.B])

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        self.weight_t, self.p_t, a_t = weight_t, self._empty(), self._empty()
        images, weight, *moments = self.inputs
        tensors = images, weight, weight_t, *moments, self.p, self.where, self.p_t, a_t, self.d
        ops.first_tangent(*self.grid, *tensors, *self.sizes)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        assert other is None, "the gradient of the input has one summand here"
        ga_t, gw = ga_t.to(self.stored), torch.empty_like(self.weight)
        images, weight, *moments = self.inputs
        read = images, ga_t, self.ga, weight, self.weight_t, *moments, self.p, self.p_t, self.where
        written = self.d, self.partial, self.tickets, gw
        ops.first_tangent_backward(*self.grid, *read, *written, self.count, *self.sizes)
        return BlockGradient(None, gw, self.d[ChannelRow.G_T], self.d[ChannelRow.B_T])


class TritonHead(TorchHead):
    """The head, with a kernel for each pass; one that is too large for a program uses torch's operations."""

    def __init__(self, a: Tensor, weight_TNF: Tensor, bias_TN: Tensor, y_TE: Tensor) -> None:
        """Compute nothing yet; arguments as in `TorchHead`."""
        # Before the first inner step of a test all tasks share one set of weights, as an expanded tensor.
        super().__init__(a, weight_TNF.contiguous(), bias_TN.contiguous(), y_TE)
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
        return cls(torch.zeros(ops.MOST_TILES, dtype=torch.int32, device=device))

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
    patches = planes[:measured].unfold(3, 3, 1).unfold(4, 3, 1).permute(1, 0, 2, 5, 6, 3, 4)
    # In float64, because the variances of c are small differences of these moments. The products of
    # all images take 13 us on an H200, and those of all tasks, which would be long and thin, 91 us.
    patches_TEDM = patches.reshape(tasks, -1, 9 * inputs, height * width).double()
    mean_TD1 = patches_TEDM.mean((1, 3)).unsqueeze(2)
    covariance_TDD = (patches_TEDM @ patches_TEDM.transpose(2, 3)).mean(1) / (height * width)
    return Planes(planes, mean_TD1, covariance_TDD - mean_TD1 @ mean_TD1.transpose(1, 2))


def _tiles(values: int, size: int) -> int:
    return -(-values // size)
