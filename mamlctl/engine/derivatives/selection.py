"""Choose the fastest derivatives for a network on a device, and the number of tasks per pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.conv4 import Conv4Derivatives
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.devices import cuda_ms, times_slower
from mamlctl.engine.kernels import c_block, c_library
from mamlctl.engine.kernels.block import BlockSettings, MakeBlock, TorchTape
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.conv4 import Conv4

# Tasks share a pass until its largest tensor (examples x filters x height x width) has this many elements.
# CPU: measured on 2 cores with 1 MB of second-level cache each. CUDA: half a gigabyte in float32, which
# leaves room on small devices; not measured.
LARGEST = {"cpu": 2**22, "cuda": 2**27}
SAME = 0.05  # largest relative difference between two correct blocks; bfloat16 has 8 significant bits


def select_derivatives(net: Net, like: Tensor, engine: EngineName = "adjoint") -> Derivatives:
    """Return the fastest derivatives of a network.

    Args:
        net: the network.
        like: a tensor of the device and dtype to use.
        engine: the --engine setting; "plain" selects torch.autograd.
    """
    if engine == "plain" or not isinstance(net, Conv4) or not net.by_hand:
        return Autograd(net)
    if like.device.type == "cuda":
        return Conv4Derivatives(net, _cuda_block(like.device, like.dtype, net.compute))
    if all(c_library.library(dtype) is not None for dtype in {net.compute or like.dtype, like.dtype}):
        return Conv4Derivatives(net, c_block.native_block, c_block.prepare)
    return Conv4Derivatives(net)


@functools.cache
def _cuda_block(device: torch.device, dtype: torch.dtype, compute: torch.dtype | None) -> MakeBlock:
    """Return the Triton block if it is faster than torch's on this device and gives the same results."""
    if dtype == torch.float64:
        return TorchTape  # Triton passes Python numbers as float32, which is not precise enough
    try:
        from triton.errors import TritonError

        from mamlctl.engine.kernels.triton_block import triton_block
    except ImportError:  # torch without Triton
        return TorchTape
    return faster_block(TorchTape, triton_block, device, dtype, compute, time_of=cuda_ms, failure=TritonError)


def faster_block(
    reference: MakeBlock,
    candidate: MakeBlock,
    device: torch.device,
    dtype: torch.dtype,
    compute: torch.dtype | None,
    *,
    time_of: Callable[[Callable[[], object]], float],
    failure: type[Exception] = RuntimeError,
) -> MakeBlock:
    """Time two implementations of a block on the second block of 20-way 1-shot with 8 tasks.

    Args:
        reference: the reference implementation.
        candidate: the one to use instead if it is faster.
        device: the device.
        dtype: of weights and images.
        compute: of the convolutions' products; None for `dtype`.
        time_of: runs a function and returns the time it took.
        failure: the exception, besides RuntimeError, from kernels that do not compile or run.

    Returns:
        `candidate` if its four passes agree with the reference and together take less time, else `reference`.
    """
    tasks, channels = 8, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

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
        for one, two in zip(passes(reference), passes(candidate), strict=True):
            if float((one - two).norm() / one.norm()) > SAME:
                return reference
        faster = time_of(lambda: passes(candidate)) < time_of(lambda: passes(reference))
        return candidate if faster else reference
    except (RuntimeError, failure):
        return reference


def slower_than_it_could_be(net: Net, like: Tensor, engine: EngineName) -> str | None:
    """Return why a run is slower than it could be here, or None; arguments as in `select_derivatives`."""
    derivatives = select_derivatives(net, like, engine)
    by_torch = isinstance(derivatives, Conv4Derivatives) and derivatives.make_block is TorchTape
    if like.device.type == "cpu" and by_torch:
        return "no working C compiler (cc): using torch operations, which are about 1.8 times slower"
    if like.device.type == "cpu" and (reason := c_library.compiled_at_every_start()):
        return reason
    if net.compute == torch.bfloat16 and like.device.type == "cpu" and c_library.lacks_bfloat16():
        slower = times_slower(torch.bfloat16)
        if slower > 1:
            times = f"{slower:.1f}" if slower < 10 else f"{slower:.0f}"
            why = "since this processor has neither avx512_bf16 nor AMX"
            return f"bf16 products are {times} times slower than float32 here, {why}"
    return None


def tasks_per_pass(net: Net, examples: int, device: torch.device) -> int:
    """Return how many tasks to adapt together.

    Args:
        net: the network.
        examples: the number of examples in the larger set of a task.
        device: the device.
    """
    return max(1, LARGEST[device.type] // (examples * net.largest))
