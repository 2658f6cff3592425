"""What is fastest where: which derivatives of a net, and how many tasks at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.conv4 import Conv4Derivatives
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.devices import cuda_ms
from mamlctl.engine.kernels import c_block
from mamlctl.engine.kernels.block import BlockSettings, MakeBlock, TorchTape
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.conv4 import Conv4

# Numbers in a pass's largest tensor, examples x height x width x filters, up to which more tasks go together.
# CPU: measured on 2 cores with 1 MB of second-level cache each (README, "How it is fast"). CUDA: half a
# gigabyte, so that small devices have room; not measured.
LARGEST = {"cpu": 2**22, "cuda": 2**27}
SAME = 0.05  # relative difference of two blocks that agree: bfloat16 keeps 8 bits


def select_derivatives(net: Net, like: Tensor, engine: EngineName = "adjoint") -> Derivatives:
    """The fastest derivatives of a net for tensors of the device and type of `like`.

    `engine`: with "plain", torch's own.
    """
    if engine == "plain" or not isinstance(net, Conv4) or not net.by_hand:
        return Autograd(net)
    if like.device.type == "cuda":
        return Conv4Derivatives(net, _cuda_block(like.device, like.dtype, net.compute))
    if all(c_block.library(dtype) is not None for dtype in {net.compute or like.dtype, like.dtype}):
        return Conv4Derivatives(net, c_block.native_block, c_block.prepare)
    return Conv4Derivatives(net)


@functools.cache
def _cuda_block(where: torch.device, dtype: torch.dtype, compute: torch.dtype | None) -> MakeBlock:
    """Triton's kernels where they are faster than torch's operations on this device, and right."""
    if dtype == torch.float64:
        return TorchTape  # Triton takes Python's numbers as float32
    try:
        from triton.errors import TritonError

        from mamlctl.engine.kernels.triton_block import triton_block
    except ImportError:  # torch without Triton
        return TorchTape
    return faster_block(TorchTape, triton_block, where, dtype, compute, time_of=cuda_ms, refused=TritonError)


def faster_block(
    sure: MakeBlock,
    other: MakeBlock,
    where: torch.device,
    dtype: torch.dtype,
    compute: torch.dtype | None,
    *,
    time_of: Callable[[Callable[[], object]], float],
    refused: type[Exception] = RuntimeError,
) -> MakeBlock:
    """`other` if it takes less time than `sure` for all four passes of one block, and agrees with it.

    The block is the second one of 20-way 1-shot with 8 tasks. Kernels that do not compile or run, which they
    tell by `refused` or a RuntimeError, are not taken.
    """
    tasks, channels = 8, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(where, dtype)

    x, x_t, ga = (
        normal(20, tasks * channels, size, size).contiguous(memory_format=torch.channels_last)
        for size in (14, 14, 7)
    )
    weight, weight_t, gamma, beta = (
        normal(tasks * channels, *size) for size in ((channels, 3, 3), (channels, 3, 3), (), ())
    )
    settings = BlockSettings(groups=tasks, compute=compute, first=False)

    def passes(make: MakeBlock) -> list[Tensor]:
        tape = make(x, weight, gamma, beta, settings)
        grads = tape.backward(ga, keep=True)
        moved = tape.tangent(x_t, weight_t)
        second = tape.tangent_backward(ga)
        return [part.double() for part in (tape.out, grads.weight, moved, second.weight)]

    try:
        for one, two in zip(passes(sure), passes(other), strict=True):
            if float((one - two).norm() / one.norm()) > SAME:
                return sure
        return other if time_of(lambda: passes(other)) < time_of(lambda: passes(sure)) else sure
    except (RuntimeError, refused):
        return sure


def slower_than_it_could_be(net: Net, like: Tensor, engine: EngineName) -> str | None:
    """What would make a run on this machine faster, in words, or None."""
    derivatives = select_derivatives(net, like, engine)
    by_torch = isinstance(derivatives, Conv4Derivatives) and derivatives.make_block is TorchTape
    if like.device.type == "cpu" and by_torch:
        return "no C compiler (cc) that works: torch's operations do its part, about 1.8 times slower"
    if net.compute == torch.bfloat16 and like.device.type == "cpu" and c_block.lacks_bfloat16():
        return "this processor has neither avx512_bf16 nor AMX: --precision bf16 is slower here than float32"
    return None


def tasks_per_pass(net: Net, examples: int, where: torch.device) -> int:
    """How many tasks, each with sets of up to `examples`, are adapted side by side."""
    return max(1, LARGEST[where.type] // (examples * net.largest))
