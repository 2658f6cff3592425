"""A CUDA device that is not there: fake tensors, which have a shape and a device but no memory.

On it a tensor that was left on the CPU raises FakeTensorDeviceMismatchError, and a tensor whose value is read
raises DataDependentOutputException. Autograd's backward pass needs a real device, so `--engine plain` does
not run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamlctl.engine.derivatives import selection
from mamlctl.engine.kernels.head import TorchHead
from mamlctl.engine.kernels.triton.block import TritonBlocks, TritonHead, prepare

CUDA = torch.device("cuda:0")
# torch's fused Adam runs on fake tensors only if the learning rate is a number.
ADAM = torch.library.Library("aten", "IMPL", "Meta")
ADAM.impl("_fused_adam_.tensor_lr", lambda *arguments, **named: None)


class HostCopyError(RuntimeError):
    """A copy from the device to the host, which waits for the device."""


class NoHostCopies(TorchDispatchMode):
    """Refuse every operation that reads a tensor of the device and writes one of the host."""

    def __torch_dispatch__(
        self, operation: OpOverload, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        read, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        if any(tensor.is_cuda for tensor in read) and any(not tensor.is_cuda for tensor in made):
            raise HostCopyError(f"{operation} copies from the device to the host")
        return result


@contextmanager
def fake_cuda(block: str = "triton") -> Iterator[torch.device]:
    """Compute on fake tensors, and refuse copies from the device to the host.

    Args:
        block: "triton" or "torch", for Conv4's derivatives.
    """

    def layout(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
        """The layout of cuDNN's results, which torch only knows for bfloat16 if it finds a device."""
        last = x.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    def no_wait(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device)  # fake tensors cannot be pinned

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch("torch.cuda.is_current_stream_capturing", lambda: True),  # so nothing is timed on the device
        patch("torch._C._conv_determine_backend_memory_format", layout),
        patch("mamlctl.data.tasks.image_tasks.to_device_no_sync", no_wait),
        patch("mamlctl.data.tasks.table_tasks.to_device_no_sync", no_wait),
        NoHostCopies(),
    ):
        plain = selection.TorchTape, selection.unprepared, TorchHead
        blocks = (TritonBlocks.on(CUDA), prepare, TritonHead) if block == "triton" else plain
        with patch.object(selection, "_cuda_blocks", lambda *arguments: blocks):
            yield CUDA
