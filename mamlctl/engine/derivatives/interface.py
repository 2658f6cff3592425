"""The derivatives that a meta-gradient needs: the gradient of a loss, and Hessian-vector products.

With L the loss of one task's set, w its fast weights and f the batch-norm row of the pass, they are

    gradient              dL/dw  and  dL/df
    product along u       H u = d/de grad_w L(w + e u) at e = 0,  and  d/df <grad_w L, u>

An implementation prepares a set of examples once (`Derivatives.prepare`) for all inner steps. The prepared
set and the tape of a gradient belong to that implementation, so callers cannot mix two of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params


class Tape(Protocol):
    """The intermediate results of a gradient that Hessian-vector products at the same weights need."""

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Compute the products of `Gradient.product`."""


class BodyTape(Protocol):
    """The intermediate results of a forward pass through the body that its backward pass needs."""

    def back_through(self, g_TEF: Tensor) -> tuple[Params, Params]:
        """Backpropagate through the body.

        Args:
            g_TEF: gradient with respect to the features.

        Returns:
            Gradients with respect to the body's weights, each with the leading axis T, and with respect to
            the norm row, _C, summed over tasks.
        """


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of one set per task, at each task's own fast weights."""

    loss_T: Tensor
    logits_TEN: Tensor
    fast: Params  # gradient of each task's loss with respect to its weights; leading axis T
    norm: Params  # gradient of the summed losses with respect to the norm row of the pass; _C
    tape: Tape | None = None  # present if the gradient was requested with keep=True
    score_T: Tensor | None = None  # the objective's score of each task, if it is known already

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Multiply the Hessian of each task's loss by a direction; may be called repeatedly.

        Conv4's hand-written derivatives do not support this if the inner loop adapts batch norm.

        Args:
            direction: u, one tensor for each fast weight, in its shape.

        Returns:
            H u, in the shapes of `fast`, and the mixed derivative d/df <grad_w L, u> in the shapes of `norm`,
            summed over tasks.
        """
        assert self.tape is not None, "a product needs a gradient that was computed with keep=True"
        return self.tape.product(direction)


class PreparedSet(Protocol):
    """One set per task, prepared for passes at any weights. Results are detached from autograd's graph."""

    def logits(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        """Compute class scores or values -> logits_TEN."""

    def gradient(self, fast: Mapping[str, Tensor], norm: NormPass, *, keep: bool = False) -> Gradient:
        """Compute each task's loss and gradient.

        Args:
            fast: the fast weights, each with the leading axis T.
            norm: batch norm of the pass, which records the statistics it computes.
            keep: keep the intermediate results that `Gradient.product` needs.
        """

    def features(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        """Pass the set through the body -> f_TEF; the head's weights may be absent from `fast`."""

    def features_and_tape(self, fast: Mapping[str, Tensor], norm: NormPass) -> tuple[Tensor, BodyTape]:
        """Do the same, and return the tape for the backward pass too."""


class Derivatives(Protocol):
    """One implementation of the derivatives of a network's loss."""

    @property
    def net(self) -> Net:
        """The network."""

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> PreparedSet:
        """Compute everything that depends on the examples only, once for all inner steps.

        Args:
            x_TECHW: the examples.
            y_TE: their labels or values.
            measured: with Statistics.SUPPORT, how many leading examples the statistics come from; None for
                all.
        """
