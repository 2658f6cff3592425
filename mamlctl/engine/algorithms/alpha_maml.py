"""Alpha-MAML: both learning rates follow their own gradients.

Behl et al. 2019 (arXiv:1905.07435). With a the inner rate, b the meta rate, g the meta-gradient
and d the direction of the last step, whose weights moved by -b d, the hypergradients are

    by the inner rate   the meta-loss's derivative by a        by the meta rate   -<g, d>

the second one after Baydin et al. 2018 (arXiv:1703.04782). The paper subtracts them from the rates.
Their sizes depend on the task and on the rates themselves, so here they move the logarithms:

    dL/d log a = a dL/da        dL/d log b = -b <g, d>

by Adam with steps of `hyper_lr`, so that a start ten times off is corrected in about log(10) / hyper_lr
meta-steps, whatever the task.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mamlctl.engine.inner_loop import RATE
from mamlctl.engine.optimizers import Adam


class Hypergradient:
    """Adam for the weights, while the inner and the meta learning rate follow their hypergradients."""

    def __init__(
        self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float], hyper_lr: float
    ) -> None:
        """`learnable`: the inner rates are those called "rate...", which move as one."""
        weights = {name: tensor for name, tensor in learnable.items() if not name.startswith(RATE)}
        self.rates = [tensor for name, tensor in learnable.items() if name.startswith(RATE)]
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
        """Ignored: the rate has no schedule."""

    def lr_now(self) -> float:
        """The meta learning rate as it is now."""
        return float(self.logs["meta"].exp())

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Both rates first, then the weights with the new ones."""
        inner_rate, meta_lr = (float(self.logs[name].exp()) for name in ("inner", "meta"))
        by_inner = sum(float(grad.sum()) for name, grad in grads.items() if name.startswith(RATE))
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
        rates = {"last": self.last, "logs": self.logs}
        hyper = {f"hyper.{part}": tensors for part, tensors in self.hyper.stored().items()}
        return rates | self.inner.stored() | hyper
