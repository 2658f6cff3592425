"""3x3 convolutions in which each task has its own weights, by the fastest method on the device.

Tensors are [E, T * C, H, W], weights [T * O, C, 3, 3]. On a CPU one convolution in T groups, channels last,
is as fast as matrix products (215 and 181 GFLOP/s on 2 cores). On a CUDA device both methods are timed once
for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.devices import cuda_ms


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
    out = weight.view(tasks, -1, weight[0].numel()) @ _patches(x, tasks)
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
    return _channels_last(_method(x, weight, tasks).forward(x, weight, tasks))


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
    return None if gx is None else _channels_last(gx), gw


def _channels_last(x: Tensor) -> Tensor:
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
