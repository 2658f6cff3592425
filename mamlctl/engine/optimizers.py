"""Adam, by torch's own function of tensors.

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


class Adam:
    """The outer optimiser (Kingma & Ba 2015, arXiv:1412.6980); its state is tensors on the weights' device.

    On a CUDA device its learning rate is a tensor too, so that a recorded step follows the schedule.
    """

    def __init__(self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> None:
        self.learnable, self.betas = dict(learnable), betas
        self.first = {name: torch.zeros_like(tensor.detach()) for name, tensor in learnable.items()}
        self.second = {name: torch.zeros_like(moment) for name, moment in self.first.items()}
        where = next(iter(self.first.values())).device
        self.on_device = where.type == "cuda"
        self.steps = {name: torch.zeros((), device=where) for name in self.first}
        self.lr: float | Tensor = torch.tensor(lr, device=where) if self.on_device else lr

    def set_lr(self, lr: float) -> None:
        """Use another learning rate from now on."""
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            self.lr = lr

    def lr_now(self) -> float:
        """The learning rate; syncs with a CUDA device."""
        return float(self.lr)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Move every weight against its gradient, in place."""
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
        """All that a checkpoint holds, sharing memory."""
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def restore(self, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy a checkpoint's state, in place, from whichever device."""
        for part, own in self.stored().items():
            for name, tensor in own.items():
                tensor.copy_(stored[part][name])


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

    def restore(self, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy a checkpoint's state, in place."""


class Sgd:
    """Plain steps: with Reptile's gradient, interpolation towards the adapted weights."""

    def __init__(self, learnable: Mapping[str, Tensor], lr: float) -> None:
        self.learnable, self.lr = dict(learnable), lr

    def set_lr(self, lr: float) -> None:
        """Use another rate from now on."""
        self.lr = lr

    def lr_now(self) -> float:
        """The rate."""
        return self.lr

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        """One step."""
        for name, tensor in self.learnable.items():
            tensor.sub_(self.lr * grads[name])

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """Nothing."""
        return {}

    def restore(self, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Nothing."""


class Hypergradient:
    """Adam for the weights, while the inner and the meta learning rate follow their own gradients.

    Alpha MAML (Behl et al. 2019, arXiv:1905.07435) subtracts hypergradients from both rates: the meta-loss's
    derivative by the inner rate, and minus the product of this gradient and the last step's direction for the
    meta rate (Baydin et al. 2018). Their sizes depend on the task and on the rates themselves, so here they
    move the logarithms, by Adam with steps of `hyper_lr`: that a start ten times off is mended in about
    log(10) / hyper_lr meta-steps is the same for all.
    """

    RATE = "rate."

    def __init__(
        self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float], hyper_lr: float
    ) -> None:
        """`learnable`: the inner rates are those called "rate...", which move as one."""
        weights = {name: tensor for name, tensor in learnable.items() if not name.startswith(self.RATE)}
        self.rates = [tensor for name, tensor in learnable.items() if name.startswith(self.RATE)]
        self.inner = Adam(weights, lr, betas)
        self.last = {name: torch.zeros_like(tensor.detach()) for name, tensor in weights.items()}
        like = self.rates[0].detach()
        # On the CPU, as torch's own Adam wants its rate there; the inner rate stays where it is used.
        self.logs = {
            "inner": like.log().reshape(()).double().cpu(),
            "meta": like.new_tensor(lr).log().double().cpu(),
        }
        self.hyper = Adam(self.logs, hyper_lr, betas)

    def set_lr(self, lr: float) -> None:
        """No schedule: the rate finds its own way."""

    def lr_now(self) -> float:
        """The meta learning rate as it is now."""
        return float(self.logs["meta"].exp())

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Both rates first, then the weights with the new ones."""
        inner_rate, meta_lr = (float(self.logs[name].exp()) for name in ("inner", "meta"))
        by_inner = sum(float(grad.sum()) for name, grad in grads.items() if name.startswith(self.RATE))
        # The last step moved the weights by -meta_lr * last.
        by_meta = -sum(float((grads[name] * last).sum()) for name, last in self.last.items())
        like = self.logs["inner"]
        self.hyper.step(
            {"inner": like.new_tensor(inner_rate * by_inner), "meta": like.new_tensor(meta_lr * by_meta)}
        )
        for rate in self.rates:
            rate.fill_(float(self.logs["inner"].exp()))
        before = {name: tensor.detach().clone() for name, tensor in self.inner.learnable.items()}
        self.inner.set_lr(self.lr_now())
        self.inner.step(grads)
        for name, tensor in self.inner.learnable.items():
            self.last[name].copy_((before[name] - tensor) / self.lr_now())

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """Both Adams, the last direction and the rates."""
        own = {"last": self.last, "logs": self.logs}
        hyper = {f"hyper.{part}": tensors for part, tensors in self.hyper.stored().items()}
        return own | self.inner.stored() | hyper

    def restore(self, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy a checkpoint's state, in place."""
        for part, own in self.stored().items():
            for name, tensor in own.items():
                tensor.copy_(stored[part][name])
