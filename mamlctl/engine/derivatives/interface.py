"""What a meta-gradient asks of a network: its loss's gradient, and Hessian-vector products of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mamlctl.engine.nets.base import HEAD, Net
from mamlctl.engine.nets.batch_norm import NormPass, Params


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of one set of every task, at the task's own weights."""

    loss_T: Tensor
    logits_TEN: Tensor
    fast: Params  # of each task's loss; every tensor leads with T
    norm: Params  # of the sum of the losses, by the norm row that the pass used; _C
    tape: Any = None  # what `product` needs, if it was asked to be kept


class Derivatives(Protocol):
    """Derivatives of a network's loss. Nothing that it returns carries a graph of its own."""

    @property
    def net(self) -> Net:
        """The network."""

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> Any:
        """What depends on a set alone, made once for all inner steps.

        `measured`: with Statistics.SUPPORT, how many leading examples give the statistics.
        """

    def logits(self, fast: Mapping[str, Tensor], prepared: Any, norm: NormPass) -> Tensor:
        """Class scores -> logits_TEN."""

    def gradient(
        self, fast: Mapping[str, Tensor], prepared: Any, norm: NormPass, *, keep: bool = False
    ) -> Gradient:
        """Gradient of every task's loss by its weights; `keep` what a product at this place needs."""

    def product(self, tape: Any, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Hessian of the loss times `direction` (leading with T), and the same by the norm row, _C.

        May be asked again of the same tape. Of Conv4 by hand not where its norm is adapted.
        """

    def features(self, fast: Mapping[str, Tensor], prepared: Any, norm: NormPass) -> tuple[Tensor, Any]:
        """What the head reads -> f_TEF, and the tape for `back_through`; the head's weights may be absent."""

    def back_through(self, tape: Any, g_TEF: Tensor) -> tuple[Params, Params]:
        """From the gradient by the features to those by the body's weights (by T) and by the norm row, _C."""


@dataclass(frozen=True)
class Autograd:
    """Derivatives of any network, by torch's own differentiation."""

    net: Net

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> tuple[Tensor, Tensor]:
        """The set as it is."""
        return x_TECHW, y_TE

    def logits(self, fast: Mapping[str, Tensor], prepared: tuple[Tensor, Tensor], norm: NormPass) -> Tensor:
        """Class scores -> logits_TEN."""
        with torch.no_grad():
            return self.net(fast, prepared[0], norm)

    def gradient(
        self,
        fast: Mapping[str, Tensor],
        prepared: tuple[Tensor, Tensor],
        norm: NormPass,
        *,
        keep: bool = False,
    ) -> Gradient:
        """Gradient by one backward pass, whose graph is the tape."""
        x_TECHW, y_TE = prepared
        leaves = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
        rows = {name: norm.row(name).detach().requires_grad_() for name in norm.params}
        with torch.enable_grad():
            seen = NormPass({name: row.unsqueeze(0) for name, row in rows.items()}, norm.running, norm.step)
            logits_TEN = self.net(leaves, x_TECHW, seen)
            loss_T = self.net.objective.loss(logits_TEN, y_TE)
            by = [*leaves.values(), *rows.values()]
            grads = torch.autograd.grad(loss_T.sum(), by, create_graph=keep)
        norm.seen.update(seen.seen)
        by_fast = dict(zip(leaves, grads[: len(leaves)], strict=True))
        by_norm = {name: grad.detach() for name, grad in zip(rows, grads[len(leaves) :], strict=True)}
        tape = (leaves, rows, by_fast) if keep else None
        detached = {name: grad.detach() for name, grad in by_fast.items()}
        return Gradient(loss_T.detach(), logits_TEN.detach(), detached, by_norm, tape)

    def product(
        self, tape: tuple[Params, Params, Params], direction: Mapping[str, Tensor]
    ) -> tuple[Params, Params]:
        """Differentiate the gradient once more, along `direction`."""
        leaves, rows, grads = tape
        by = [*leaves.values(), *rows.values()]
        along = [direction[name] for name in grads]
        products = torch.autograd.grad(
            list(grads.values()), by, along, materialize_grads=True, retain_graph=True
        )
        split = len(leaves)
        return dict(zip(leaves, products[:split], strict=True)), dict(
            zip(rows, products[split:], strict=True)
        )

    def features(
        self, fast: Mapping[str, Tensor], prepared: tuple[Tensor, Tensor], norm: NormPass
    ) -> tuple[Tensor, tuple[Params, Params, Tensor]]:
        """Forward through the body, whose graph is the tape."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in fast.items() if name not in HEAD}
        rows = {name: norm.row(name).detach().requires_grad_() for name in norm.params}
        with torch.enable_grad():
            by_rows = {name: row.unsqueeze(0) for name, row in rows.items()}
            seen = replace(norm, params=by_rows, step=norm.step, seen=norm.seen)
            f_TEF = self.net.features(leaves, prepared[0], seen)
        return f_TEF.detach(), (leaves, rows, f_TEF)

    def back_through(self, tape: tuple[Params, Params, Tensor], g_TEF: Tensor) -> tuple[Params, Params]:
        """One backward pass."""
        leaves, rows, f_TEF = tape
        grads = torch.autograd.grad(f_TEF, [*leaves.values(), *rows.values()], g_TEF)
        return dict(zip(leaves, grads[: len(leaves)], strict=True)), dict(
            zip(rows, grads[len(leaves) :], strict=True)
        )
