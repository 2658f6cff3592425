"""The outer optimisers: plain steps, and Adam by torch's own function of tensors.

The class `torch.optim.Adam` imports torch's compiler when it is made: 1.3 of the 3.9 s from start to the
first meta-step (one core of a 2-core virtual machine).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

EPS = 1e-8  # torch's default


class Optimizer(Protocol):
    """Moves the learnable tensors in place; its state is tensors on their device."""

    def set_lr(self, lr: float) -> None:
        """Follow the schedule, where there is one."""

    def lr_now(self) -> float:
        """The meta learning rate; syncs with the device where it lives there."""

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """One step against the gradients."""

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, sharing memory."""


def restore(optimizer: Optimizer, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy a checkpoint's state, in place, from whichever device."""
    for part, tensors in optimizer.stored().items():
        for name, tensor in tensors.items():
            tensor.copy_(stored[part][name])


class Adam:
    """The outer optimiser (Kingma & Ba 2015, arXiv:1412.6980); its state is tensors on the weights' device.

    On a CUDA device its learning rate is a tensor too, so that a recorded step follows the schedule.
    """

    def __init__(self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> None:
        self.learnable, self.betas = dict(learnable), betas
        self.first = {name: torch.zeros_like(tensor.detach()) for name, tensor in learnable.items()}
        self.second = {name: torch.zeros_like(moment) for name, moment in self.first.items()}
        device = next(iter(self.first.values())).device
        self.on_device = device.type == "cuda"
        self.steps = {name: torch.zeros((), device=device) for name in self.first}
        self.lr: float | Tensor = torch.tensor(lr, device=device) if self.on_device else lr

    def set_lr(self, lr: float) -> None:
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            self.lr = lr

    def lr_now(self) -> float:
        """The learning rate; syncs with a CUDA device."""
        return float(self.lr)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        adam(
            list(self.learnable.values()),
            [grads[name] for name in self.learnable],
            list(self.first.values()),
            list(self.second.values()),
            [],
            list(self.steps.values()),
            capturable=self.on_device,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def stored(self) -> dict[str, dict[str, Tensor]]:
        return {"first": self.first, "second": self.second, "steps": self.steps}


class Sgd:
    """Plain steps: with Reptile's gradient, interpolation towards the adapted weights."""

    def __init__(self, learnable: Mapping[str, Tensor], lr: float) -> None:
        self.learnable, self.lr = dict(learnable), lr

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def lr_now(self) -> float:
        return self.lr

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        for name, tensor in self.learnable.items():
            tensor.sub_(self.lr * grads[name])

    def stored(self) -> dict[str, dict[str, Tensor]]:
        return {}
