"""The outer optimisers: SGD, and Adam through torch's functional `adam`.

The class `torch.optim.Adam` imports torch's compiler when it is constructed. This takes 1.3 of the 3.9 s from
the start of the program to the first meta-step (one core of a 2-core virtual machine).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

EPS = 1e-8  # torch's default


class Optimizer(Protocol):
    """Updates the learnable tensors in place; its own state is tensors on the same device."""

    def set_lr(self, lr: float) -> None:
        """Set the meta learning rate; ignored by an optimiser that learns its own rate."""

    def lr_now(self) -> float | None:
        """Return the meta learning rate; synchronises with the device if the rate is a tensor there.

        None if the steps have no rate.
        """

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Descend along the gradients, which have the names and shapes of the learnable tensors."""

    def restart(self) -> None:
        """Forget the earlier steps, for a loss with gradients of another size."""

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """Return the state that a checkpoint contains, without copying it."""


class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1). With g the gradient and t the number of steps:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        w = w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    On a CUDA device the learning rate is a tensor, because a CUDA graph reads tensors again at each replay
    but keeps a Python number as it was when the graph was recorded.
    """

    def __init__(self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> None:
        """Start with moments of 0.

        Args:
            learnable: the tensors to update in place, by name.
            lr: the meta learning rate of the first step.
            betas: the decay rates b1 and b2 of both moments.
        """
        self.learnable, self.betas = dict(learnable), betas
        self.first = {name: torch.zeros_like(tensor.detach()) for name, tensor in learnable.items()}
        self.second = {name: torch.zeros_like(moment) for name, moment in self.first.items()}
        device = next(iter(self.first.values())).device
        self.on_device = device.type == "cuda"
        self.steps = {name: torch.zeros((), device=device) for name in self.first}
        self.lr: float | Tensor = torch.tensor(lr, device=device) if self.on_device else lr

    def set_lr(self, lr: float | Tensor) -> None:
        """Set the meta learning rate; a tensor must be on the device of the weights."""
        if isinstance(self.lr, Tensor):
            self.lr.copy_(lr) if isinstance(lr, Tensor) else self.lr.fill_(lr)
        else:
            self.lr = float(lr)

    def lr_now(self) -> float:
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
            # One launch for all tensors in place of about a dozen for each.
            fused=self.on_device,
            capturable=self.on_device,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    @torch.no_grad()
    def restart(self) -> None:
        for tensor in (*self.first.values(), *self.second.values(), *self.steps.values()):
            tensor.zero_()

    def stored(self) -> dict[str, dict[str, Tensor]]:
        return {"first": self.first, "second": self.second, "steps": self.steps}


class Sgd:
    """Plain gradient descent, w = w - lr g; Reptile's outer step (see algorithms/reptile.py)."""

    def __init__(self, learnable: Mapping[str, Tensor], lr: float) -> None:
        self.learnable, self.lr = dict(learnable), lr

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def lr_now(self) -> float | None:
        return self.lr

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        for name, tensor in self.learnable.items():
            tensor.sub_(self.lr * grads[name])

    def restart(self) -> None:
        pass

    def stored(self) -> dict[str, dict[str, Tensor]]:
        return {}


class WholeSteps(Sgd):
    """w = w - g, for meta-gradients that are whole steps, as those inside a trust region."""

    def __init__(self, learnable: Mapping[str, Tensor]) -> None:
        super().__init__(learnable, 1.0)

    def set_lr(self, lr: float) -> None:
        """Ignore the meta learning rate: the trust region decides the size of a step."""

    def lr_now(self) -> None:
        return None
