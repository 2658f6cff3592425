"""What is fastest where: which derivatives of a net, and how many tasks at a time."""

from __future__ import annotations

from torch import Tensor, device

from mamlctl.engine import native
from mamlctl.engine.blocks import TorchTape
from mamlctl.engine.conv4 import Conv4Derivatives
from mamlctl.engine.derivatives import Autograd, Derivatives
from mamlctl.engine.nets import Conv4, Net

# Numbers in a pass's largest tensor, examples x height x width x filters, up to which more tasks go together.
# CPU: measured on 2 cores with 1 MB of second-level cache each (README, "How it is fast"). CUDA: half a
# gigabyte, so that small devices have room; not measured.
LARGEST = {"cpu": 2**22, "cuda": 2**27}


def derivatives_of(net: Net, like: Tensor, engine: str = "adjoint") -> Derivatives:
    """The fastest derivatives of a net for tensors of the device and type of `like`.

    `engine`: with "plain", torch's own.
    """
    if engine == "plain" or not isinstance(net, Conv4):
        return Autograd(net)
    if like.device.type == "cpu" and native.library(net.compute or like.dtype) is not None:
        return Conv4Derivatives(net, native.native_block, native.prepare)
    return Conv4Derivatives(net)


def slower_than_it_could_be(net: Net, like: Tensor, engine: str) -> str | None:
    """What would make a run on this machine faster, in words, or None."""
    found = derivatives_of(net, like, engine)
    if like.device.type == "cpu" and isinstance(found, Conv4Derivatives) and found.make_block is TorchTape:
        return "no C compiler (cc) that works: torch's operations do its part, about 1.8 times slower"
    return None


def tasks_per_pass(net: Net, examples: int, where: device) -> int:
    """How many tasks, each with sets of up to `examples`, are adapted side by side."""
    _, height, width = net.image_shape
    return max(1, LARGEST[where.type] // (examples * height * width * net.filters))
