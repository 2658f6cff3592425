"""Alpha-MAML: the inner and the meta learning rate are learnt by gradient descent.

Behl et al. 2019 (arXiv:1905.07435). Let a be the inner rate, b the meta rate, L the meta-loss and g its
gradient with respect to the slow weights w. The previous meta-step moved the weights by -b d. Then L as a
function of both rates has the gradients (hypergradients)

    dL/da, part of the meta-gradient like any learnt inner rate        dL/db = <g, dw/db> = -<g, d>

The second one is that of Baydin et al. 2018 (arXiv:1703.04782). The paper subtracts the hypergradients from
the rates. Their sizes depend on the data and on the rates themselves, so here they update the logarithms,

    dL/d log a = a dL/da        dL/d log b = -b <g, d>

with Adam at rate `hyper_lr`. Adam's steps have about this size for gradients of any size, so a rate that
starts 10 times too large or small is corrected in about log(10) / hyper_lr meta-steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mamlctl.engine.inner_loop import RATE
from mamlctl.engine.optimizers import Adam


class Hypergradient:
    """Adam for the weights, and a second Adam for the logarithms of the inner and the meta rate."""

    def __init__(
        self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float], hyper_lr: float
    ) -> None:
        """Start at the rates of the settings.

        Args:
            learnable: the tensors to update in place; names that begin with "rate." are inner rates, which
                all have one shared value.
            lr: the initial meta learning rate b.
            betas: the decay rates of both Adams.
            hyper_lr: the learning rate of log a and log b.
        """
        weights = {name: tensor for name, tensor in learnable.items() if not name.startswith(RATE)}
        self.rates = [tensor for name, tensor in learnable.items() if name.startswith(RATE)]
        self.inner = Adam(weights, lr, betas)
        self.last = {name: torch.zeros_like(tensor.detach()) for name, tensor in weights.items()}
        like = self.rates[0].detach()
        self.logs = {
            "inner": like.log().reshape(()).double(),
            "meta": like.new_full((), lr).log().double(),
        }
        self.hyper = Adam(self.logs, hyper_lr, betas)

    def set_lr(self, lr: float) -> None:
        """Do nothing: the rate is learnt, so it has no schedule."""

    def lr_now(self) -> float:
        return float(self.logs["meta"].exp())

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Update both rates, then the weights with the new meta rate."""
        zero = self.logs["inner"].new_zeros(())
        # dL/da: all tensors share the inner rate, so their gradients add up.
        by_inner = sum((grad.sum().double() for name, grad in grads.items() if name.startswith(RATE)), zero)
        # dL/db = -<g, d>, with d the direction of the previous step.
        by_meta = -sum(((grads[name] * last).sum().double() for name, last in self.last.items()), zero)
        self.hyper.step(
            {"inner": self.logs["inner"].exp() * by_inner, "meta": self.logs["meta"].exp() * by_meta}
        )
        for rate in self.rates:
            rate.copy_(self.logs["inner"].exp())
        before = {name: tensor.detach().clone() for name, tensor in self.inner.learnable.items()}
        meta_lr = self.logs["meta"].exp()
        self.inner.set_lr(meta_lr)
        self.inner.step(grads)
        # Adam's direction d follows from the step that it took, -b d.
        for name, tensor in self.inner.learnable.items():
            self.last[name].copy_((before[name] - tensor) / meta_lr)

    def restart(self) -> None:
        self.inner.restart()
        self.hyper.restart()
        for last in self.last.values():
            last.zero_()

    def stored(self) -> dict[str, dict[str, Tensor]]:
        rates = {"last": self.last, "logs": self.logs}
        hyper = {f"hyper.{part}": tensors for part, tensors in self.hyper.stored().items()}
        return rates | self.inner.stored() | hyper
