"""Named tensors in one buffer, so that an operation on all of them is a single one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Filters of this many channels are channels last on a CUDA device: the kernels of the inner blocks and cuDNN
# read them so, and return their gradients so.
LAST_CHANNELS = 8


class Flat(dict[str, Tensor]):
    """Named tensors that are views of one buffer, one after another, each of them without gaps."""

    def __init__(self, buffer: Tensor, shapes: Mapping[str, torch.Size]) -> None:
        """Divide a buffer of one dimension into tensors of these shapes."""
        parts = torch.split(buffer, [shape.numel() for shape in shapes.values()])
        super().__init__(
            {
                name: _unflattened(part, shape)
                for (name, shape), part in zip(shapes.items(), parts, strict=True)
            }
        )
        self.buffer, self.shapes = buffer, shapes
        self._casts: dict[torch.dtype, Flat] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Flat:
        """Return the tensors in one buffer: the same if they are in one already, else copies."""
        if isinstance(tensors, Flat):
            return tensors
        buffer = torch.cat([flattened(tensor) for tensor in tensors.values()])
        return cls(buffer, {name: tensor.shape for name, tensor in tensors.items()})

    def cast(self, dtype: torch.dtype) -> Flat:
        """Return the tensors in another dtype; the same object the next time."""
        if dtype not in self._casts:
            self._casts[dtype] = self.like(self.buffer.to(dtype))
        return self._casts[dtype]

    def like(self, buffer: Tensor) -> Flat:
        """Return the tensors of another buffer, with the names and shapes of this one."""
        return Flat(buffer, self.shapes)

    def ordered(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a buffer of other tensors with the same names and shapes, in the order of this one."""
        if isinstance(tensors, Flat) and list(tensors) == list(self):
            return tensors.buffer
        return torch.cat([flattened(tensors[name]) for name in self])


def flattened(tensor: Tensor) -> Tensor:
    """Return a tensor as a vector, in the order in which a buffer holds it."""
    return (tensor.permute(0, 1, 3, 4, 2) if _is_channels_last(tensor) else tensor).flatten()


def _unflattened(part: Tensor, shape: torch.Size) -> Tensor:
    if not _is_channels_last(part.view(shape)):
        return part.view(shape)
    tasks, outputs, inputs, *size = shape
    return part.view(tasks, outputs, *size, inputs).permute(0, 1, 4, 2, 3)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether these are filters _TOCHW that a buffer holds channels last."""
    return tensor.is_cuda and tensor.dim() == 5 and tensor.shape[2] >= LAST_CHANNELS
