"""Choose the fastest derivatives for a network on a device, and the number of tasks per pass."""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.conv4 import Conv4Derivatives, PrepareFirst, unprepared
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.devices import times_slower
from mamlctl.engine.kernels import c_block, c_library
from mamlctl.engine.kernels.block import BlockSettings, MakeBlock, Planes, TorchTape
from mamlctl.engine.kernels.convolutions import Direct
from mamlctl.engine.kernels.head import LossHead, MakeHead, TorchHead
from mamlctl.engine.kernels.winograd import Winograd
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.conv4 import Conv4

# Tasks share a pass until its largest tensor (examples x filters x height x width) has this many elements.
# CPU: measured on 2 cores with 1 MB of second-level cache each. CUDA: half a gigabyte in float32, which
# leaves room on small devices; not measured.
LARGEST = {"cpu": 2**22, "cuda": 2**27}
# CUDA limits the second size of a grid of programs, which grows with the tasks and the square of the filters.
MOST_TASKS, MOST_FILTERS_SQUARED = 2**12, 2**24  # of a pass; the second is a sum over tasks
Parts = tuple[MakeBlock, PrepareFirst, MakeHead]  # one implementation of Conv4's parts
# Largest relative difference between two correct blocks. In bfloat16, with 8 significant bits, two values of
# a pooling window are often so close that one block selects the other: 4 % in gradients of small blocks were
# measured, and more than 5 % at the size that is compared. Wrong blocks differ by about 100 %.
SAME, SAME_BF16 = 0.05, 0.2


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
        block, prepare, head = _cuda_blocks(like.device, like.dtype, net.compute)
        return Conv4Derivatives(net, block, prepare, make_head=_head_for(net, head))
    if all(c_library.library(dtype) is not None for dtype in {net.compute or like.dtype, like.dtype}):
        winograd = net.conv == "winograd" or (net.conv == "auto" and like.dtype == torch.float32)
        make_conv = Winograd if winograd and net.compute in (None, like.dtype) else Direct
        return Conv4Derivatives(net, c_block.native_block, c_block.prepare, make_conv, _head_for(net))
    return Conv4Derivatives(net, make_head=_head_for(net))


def _head_for(net: Net, fastest: MakeHead = TorchHead) -> MakeHead:
    """Return the head with the loss of a network; `fastest` is for the cross-entropy only."""
    return fastest if net.objective.has_default_loss else partial(LossHead, loss=net.objective.loss)


@functools.cache
def _cuda_blocks(device: torch.device, dtype: torch.dtype, compute: torch.dtype | None) -> Parts:
    """Return the Triton blocks if they compile for this device and agree with torch's, else torch's."""
    plain: Parts = TorchTape, unprepared, TorchHead
    if dtype == torch.float64:
        return plain  # Triton passes Python numbers as float32, which is not precise enough
    try:
        from triton.errors import TritonError

        from mamlctl.engine.kernels.triton.block import TritonBlocks, TritonHead, prepare
    except ImportError:  # torch without Triton
        return plain
    blocks: Parts = TritonBlocks.on(device), prepare, TritonHead
    same = agree(plain, blocks, torch.empty(0, device=device, dtype=dtype), compute, failure=TritonError)
    return blocks if same else plain


def agree(
    reference: Parts,
    candidate: Parts,
    like: Tensor,
    compute: torch.dtype | None,
    *,
    failure: type[Exception] = RuntimeError,
) -> bool:
    """Whether two implementations of the first block, of the others and of the head give the same results.

    Args:
        reference: the reference implementation.
        candidate: the other one.
        like: a tensor of the device and dtype to use.
        compute: of the convolutions' products; None for the dtype of `like`.
        failure: the exception, besides RuntimeError, from kernels that do not compile or run.
    """
    tasks, filters, examples, side = 8, 64, 20, 14
    same = SAME_BF16 if compute == torch.bfloat16 else SAME
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        tensor = torch.randn(size, generator=generator).to(like)
        return tensor.contiguous(memory_format=torch.channels_last) if len(size) == 4 else tensor

    def passes(make: MakeBlock, x_t: Tensor | None, planes: Planes | None) -> list[Tensor]:
        settings = BlockSettings(tasks, compute, first=x_t is None, planes=planes)
        tape = make(x, weight, gamma, beta, settings)
        grads = tape.backward(ga, keep=True)
        moved = tape.tangent(x_t, weight_t)
        second = tape.tangent_backward(ga)
        return [part.double() for part in (tape.out, grads.weight, moved, second.weight)]

    try:
        for inputs in (1, filters):
            x, ga = normal(examples, tasks * inputs, side, side), normal(examples, tasks * filters, 7, 7)
            weight, weight_t = (normal(tasks * filters, inputs, 3, 3) for _ in range(2))
            gamma, beta = normal(tasks * filters), normal(tasks * filters)
            x_t = None if inputs == 1 else normal(*x.shape)
            one, two = (
                passes(make, x_t, None if x_t is not None else prepare(x, tasks, None))
                for make, prepare, _ in (reference, candidate)
            )
            if any(float((a - b).norm() / a.norm()) > same for a, b in zip(one, two, strict=True)):
                return False
        weight, weight_t = (normal(tasks, 20, 49 * filters) / side**2 for _ in range(2))
        bias, y = normal(tasks, 20), torch.arange(examples, device=like.device).expand(tasks, -1)
        heads = [
            make(ga.to(compute or like.dtype), weight, bias, y.contiguous())
            for *_, make in (reference, candidate)
        ]
        passes_of = [
            (head.gradient(keep=True), head.tangent(head.a, weight_t, bias), head.loss_T) for head in heads
        ]
        flat = [
            [part.double() for part in (*vars(first).values(), *vars(second).values(), loss)]
            for first, second, loss in passes_of
        ]
        if any(float((a - b).norm() / a.norm()) > same for a, b in zip(*flat, strict=True)):
            return False
    except (RuntimeError, failure):
        return False
    return True


def slower_than_it_could_be(net: Net, like: Tensor, engine: EngineName) -> str | None:
    """Return why a run is slower than it could be here, or None; arguments as in `select_derivatives`."""
    derivatives = select_derivatives(net, like, engine)
    by_torch = isinstance(derivatives, Conv4Derivatives) and derivatives.make_block is TorchTape
    not_compiled = engine == "compiled" and c_library.library(like.dtype) is None
    if like.device.type == "cpu" and (by_torch or not_compiled):
        factor = 7 if not_compiled else 1.8
        return f"no working C compiler (cc): using torch operations, which are about {factor} times slower"
    if like.device.type == "cpu" and (reason := c_library.compiled_at_every_start()):
        return reason
    if net.compute == torch.bfloat16 and like.device.type == "cpu" and c_library.lacks_bfloat16():
        slower = times_slower(torch.bfloat16)
        if slower > 1:
            ratio = f"{slower:.1f}" if slower < 10 else f"{slower:.0f}"
            why = "since this processor has neither avx512_bf16 nor AMX"
            return f"bf16 products are {ratio} times slower than float32 here, {why}"
    return None


def tasks_per_pass(net: Net, examples: int, device: torch.device) -> int:
    """Return how many tasks to adapt together.

    Args:
        net: the network.
        examples: the number of examples in the larger set of a task.
        device: the device.
    """
    most = LARGEST[device.type] // (examples * net.largest)
    if device.type == "cuda":
        most = min(most, MOST_TASKS)
        if isinstance(net, Conv4):
            most = min(most, MOST_FILTERS_SQUARED // net.filters**2)
    return max(1, most)
