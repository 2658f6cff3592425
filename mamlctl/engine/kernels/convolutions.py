"""3x3 convolutions in which each task has its own weights.

`Direct` is the fastest direct method on the device; `winograd.py` has the other implementation of
`Convolution`.

Tensors are [E, T * C, H, W], weights [T * O, C, 3, 3]. On a CPU one convolution in T groups, channels last,
is as fast as matrix products (215 and 181 GFLOP/s on 2 cores). On a CUDA device the
blocks in Triton have their own convolutions. In float64, or if those blocks do not work, both methods are
timed once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.devices import cuda_ms


class Convolution(Protocol):
    """A convolution with stride 1, padding 1 and fixed weights.

    A Hessian-vector product needs sums of two convolutions, by the product rule; an implementation may return
    the summands, which the next kernel then adds, or their sum and None.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve [E, T * C, H, W] to [E, T * O, H, W], channels last."""

    def backward(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients by input (channels last) and by weight from that by output, g."""

    def tangent(self, x: Tensor, x_t: Tensor, weight_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the summands of the tangent of the output, conv(x, weight_t) and conv(x_t, weight).

        Args:
            x: the input.
            x_t: its tangent.
            weight_t: the tangent of the weights, which `tangent_backward` uses too.
        """

    def tangent_backward(
        self, g_t: Tensor, x: Tensor, g: Tensor, x_t: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Compute the tangents of both gradients along x_t and the weight_t of the last `tangent`.

        Args:
            g_t: tangent of the gradient by output.
            x, g: as in `backward`.
            x_t: tangent of the input.

        Returns:
            The summands of the tangent by input, and the tangent by weight.
        """


class MakeConvolution(Protocol):
    """An implementation of `Convolution`."""

    def __call__(self, weight: Tensor, tasks: int) -> Convolution:
        """Prepare weights [T * O, C, 3, 3] of `tasks` tasks."""


@dataclass(frozen=True)
class Method:
    """One method to compute a convolution and its gradients."""

    forward: Callable[[Tensor, Tensor, int], Tensor]  # x, weight, tasks -> out
    # gradient of out, x, weight, tasks, whether x needs a gradient -> gradients of x and weight
    backward: Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor | None, Tensor]]


def _grouped(x: Tensor, weight: Tensor, tasks: int) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=tasks)


def _grouped_backward(
    g: Tensor, x: Tensor, weight: Tensor, tasks: int, by_input: bool
) -> tuple[Tensor | None, Tensor]:
    ones, mask = [1, 1], [by_input, True, False]
    gx, gw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, ones, ones, ones, False, [0, 0], tasks, mask
    )
    return gx if by_input else None, gw


def _patches(x: Tensor, tasks: int) -> Tensor:
    """Copy every 3x3 patch of each task's images into a column -> [T, 9 C, E * H * W]."""
    examples, channels, height, width = x.shape
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    windows = windows.reshape(examples, tasks, channels // tasks, height, width, 9)
    return windows.permute(1, 2, 5, 0, 3, 4).reshape(tasks, 9 * channels // tasks, -1)


def _by_task(x: Tensor, tasks: int) -> Tensor:
    """Reshape [E, T * C, H, W] to [T, C, E * H * W]."""
    examples, _, height, width = x.shape
    return x.reshape(examples, tasks, -1, height, width).permute(1, 2, 0, 3, 4).flatten(2)


def _products(x: Tensor, weight: Tensor, tasks: int) -> Tensor:
    examples, _, height, width = x.shape
    out = weight.reshape(tasks, -1, weight[0].numel()) @ _patches(x, tasks)
    out = out.view(tasks, -1, examples, height, width).permute(2, 0, 1, 3, 4).flatten(1, 2)
    return out.contiguous(memory_format=torch.channels_last)


def _products_backward(
    g: Tensor, x: Tensor, weight: Tensor, tasks: int, by_input: bool
) -> tuple[Tensor | None, Tensor]:
    gw = (_by_task(g, tasks) @ _patches(x, tasks).transpose(1, 2)).view_as(weight)
    if not by_input:
        return None, gw
    # The gradient of the input is the convolution of g with the weight rotated by 180 degrees, whose input
    # and output channels are exchanged.
    rotated = weight.view(tasks, -1, *weight.shape[1:]).transpose(1, 2).flip(-1, -2).flatten(0, 1)
    return _products(g, rotated.contiguous(), tasks), gw


GROUPED = Method(_grouped, _grouped_backward)
PRODUCTS = Method(_products, _products_backward)


@dataclass
class Direct:
    """Implements `Convolution` by the fastest direct method on the device."""

    weight: Tensor
    tasks: int

    def __call__(self, x: Tensor) -> Tensor:
        return conv(x, self.weight, self.tasks)

    def backward(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        gx, gw = conv_backward(g, x, self.weight, self.tasks, by_input=True)
        assert gx is not None
        return gx, gw

    def tangent(self, x: Tensor, x_t: Tensor, weight_t: Tensor) -> tuple[Tensor, Tensor]:
        self.along = Direct(weight_t, self.tasks)
        return self.along(x), self(x_t)

    def tangent_backward(
        self, g_t: Tensor, x: Tensor, g: Tensor, x_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx_t, gw_t = self.backward(g_t, x)
        # Both other summands come from one call: the input gradient from g and weight_t, the filter gradient
        # from g and x_t.
        gx_2, gw_2 = self.along.backward(g, x_t)
        return gx_t, gx_2, gw_t + gw_2


_chosen: dict[tuple[object, ...], Method] = {}


def conv(x: Tensor, weight: Tensor, tasks: int) -> Tensor:
    """Convolve with stride 1 and padding 1.

    Args:
        x: the input, [E, T * C, H, W].
        weight: the filters, [T * O, C, 3, 3].
        tasks: T.

    Returns:
        The output, [E, T * O, H, W], channels last.
    """
    return channels_last(_method(x, weight, tasks).forward(x, weight, tasks))


def conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, tasks: int, *, by_input: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute the gradients of a convolution.

    Args:
        g: gradient with respect to the output, [E, T * O, H, W].
        x: the input, [E, T * C, H, W].
        weight: the filters, [T * O, C, 3, 3].
        tasks: T.
        by_input: whether to compute the gradient with respect to the input.

    Returns:
        The gradients with respect to the input (channels last, or None) and to the filters.
    """
    gx, gw = _method(x, weight, tasks).backward(g, x, weight, tasks, by_input)
    return None if gx is None else channels_last(gx), gw


def channels_last(x: Tensor) -> Tensor:
    """Convert to the layout that the kernels read: with one channel torch may return the other layout."""
    return x.contiguous(memory_format=torch.channels_last)


def _method(x: Tensor, weight: Tensor, tasks: int) -> Method:
    if x.device.type != "cuda":
        return GROUPED
    key = (tuple(x.shape), tuple(weight.shape), x.dtype, x.device, torch.backends.cudnn.allow_tf32)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return GROUPED  # timing synchronises, which a capture does not allow
        _chosen[key] = fastest((GROUPED, PRODUCTS), x, weight, tasks, cuda_ms)
    return _chosen[key]


def fastest(
    methods: tuple[Method, ...],
    x: Tensor,
    weight: Tensor,
    tasks: int,
    time_of: Callable[[Callable[[], object]], float],
) -> Method:
    """Return the method whose forward and backward pass together take the least time.

    Args:
        methods: the methods.
        x: an input.
        weight: filters.
        tasks: T.
        time_of: runs a function and returns the time it took.
    """

    def once(method: Method) -> Callable[[], object]:
        return lambda: method.backward(method.forward(x, weight, tasks), x, weight, tasks, True)

    return min(methods, key=lambda method: time_of(once(method)))
