"""The 3x3 convolutions of the inner blocks on CUDA devices: shapes and tiles of the kernels in Triton.

Tensors are [E, T * C, H, W] and filters [T * O, C, 3, 3], all channels last. A pair is a second input with
its own filters, whose result is added: both summands of the product rule come from one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamlctl.engine.kernels.convolutions import channels_last
from mamlctl.engine.kernels.triton import ops

# Chosen on an H200, by the times of the convolutions of 20-way 1-shot.
FEWEST = 100  # programs of a launch, below which tiles are made smaller; the device has 132 multiprocessors
PIXELS = (128, 64, 32)  # of a tile
WIDEST = 64  # channels of the result in a tile
DEEPEST = 128  # bytes of a pixel's input channels in a tile: a line of the cache
MOST_PARTS, FEWEST_PIXELS = 8, 64  # programs that share a filter's pixels, and the pixels of each

Pair = tuple[Tensor, Tensor]


def convolve(
    x: Tensor, weight: Tensor, tasks: int, pair: Pair | None = None, *, back: bool = False
) -> Tensor:
    """Convolve with stride 1 and padding 1.

    Args:
        x: the input, or the gradient of the output.
        weight: the filters.
        tasks: T.
        pair: a second input and its filters, or None.
        back: compute the gradient by input from that by output.

    Returns:
        The output, or the gradient by input.
    """
    examples, _, height, width = x.shape
    outputs = weight.shape[1] * tasks if back else len(weight)
    given, made = x.shape[1] // tasks, outputs // tasks
    out = _empty(examples, outputs, height, width, x)
    pixels = examples * height * width
    wide = min(ops.tile(made), WIDEST)
    tiles = tasks * -(-made // wide)
    high = next((size for size in PIXELS if -(-pixels // size) * tiles >= FEWEST), PIXELS[-1])
    if x.dtype == torch.bfloat16:
        high = 64
    elif back:
        # In TF32 larger tiles use instructions for which these filters must be transposed: 58 us, not 29.
        high = 32
    x2, w2 = pair or (None, None)
    ops.convolve(
        -(-pixels // high), tiles,
        x, channels_last(weight), x2, None if w2 is None else channels_last(w2), out,
        pixels, height, width, tasks, given, made,
        back, _in_tf32(), high, wide, min(ops.tile(given), DEEPEST // x.itemsize),
    )  # fmt: skip
    return out


def filter_gradient(
    g: Tensor, x: Tensor, tasks: int, tickets: Tensor, dtype: torch.dtype, pair: Pair | None = None
) -> Tensor:
    """Compute the gradient of the filters.

    Args:
        g: the gradient of the output.
        x: the input.
        tasks: T.
        tickets: counters of 0, see `channels.is_last`.
        dtype: of the result.
        pair: a second gradient and its input, or None.

    Returns:
        The gradient, [T * O, C, 3, 3].
    """
    examples, outputs, height, width = g.shape
    given, made, pixels = x.shape[1] // tasks, outputs // tasks, examples * height * width
    gw = _empty(outputs, given, 3, 3, x, dtype)
    wide, deep = min(ops.tile(made), WIDEST), min(ops.tile(given), 32)
    tiles = 3 * tasks * -(-made // wide) * -(-given // deep)
    parts = 1
    while parts < MOST_PARTS and tiles * parts < 2 * FEWEST and pixels >= 2 * parts * FEWEST_PIXELS:
        parts *= 2
    sums = x.new_empty(parts if parts > 1 else 0, gw.numel(), dtype=dtype)
    g2, x2 = pair or (None, None)
    ops.filter_gradient(
        parts, tiles,
        g, x, g2, x2, gw, sums, tickets,
        pixels, height, width, tasks, given, made,
        parts, _in_tf32(), DEEPEST // x.itemsize, wide, deep,
    )  # fmt: skip
    return gw


def _in_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _empty(
    first: int, second: int, height: int, width: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    size, layout = (first, second, height, width), torch.channels_last
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
