"""What a meta-gradient needs of a network: its loss's gradient, and Hessian-vector products of that.

`Derivatives.prepare` makes of a set of examples an object that knows its own arithmetic, and a kept gradient
holds a tape that does: so no caller can give one arithmetic what another has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, Params


class Tape(Protocol):
    """What a gradient leaves for products with the Hessian at its place."""

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """As `Gradient.product`."""


class BodyTape(Protocol):
    """What a forward pass through the body leaves for the way back."""

    def back_through(self, g_TEF: Tensor) -> tuple[Params, Params]:
        """From the gradient by the features to those by the body's weights (by T) and by the norm row, _C."""


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of one set of every task, at the task's own weights."""

    loss_T: Tensor
    logits_TEN: Tensor
    fast: Params  # of each task's loss; every tensor leads with T
    norm: Params  # of the sum of the losses, by the norm row that the pass used; _C
    tape: Tape | None = None  # what `product` needs, if it was asked to be kept

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Hessian of the loss times `direction` (leading with T), and the same by the norm row, _C."""
        # May be asked for again; by Conv4's derivatives by hand not where its norm is adapted.
        assert self.tape is not None, "a product needs a gradient that was kept"
        return self.tape.product(direction)


class PreparedSet(Protocol):
    """One set of every task, with all that depends on the set alone. No result carries a graph of its own."""

    def logits(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        """Class scores -> logits_TEN."""

    def gradient(self, fast: Mapping[str, Tensor], norm: NormPass, *, keep: bool = False) -> Gradient:
        """Gradient of every task's loss by its weights; `keep` what a product at this place needs."""

    def features(self, fast: Mapping[str, Tensor], norm: NormPass) -> tuple[Tensor, BodyTape]:
        """What the head reads -> f_TEF, and the way back from there; the head's weights may be absent."""


class Derivatives(Protocol):
    """Derivatives of a network's loss, in one arithmetic."""

    @property
    def net(self) -> Net:
        """The network."""

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> PreparedSet:
        """Make what depends on a set alone, once for all inner steps.

        `measured`: with Statistics.SUPPORT, how many leading examples give the statistics.
        """
