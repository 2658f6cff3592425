"""Derivatives of any network by torch.autograd: the reference for the hand-written ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.engine.derivatives.interface import Gradient
from mamlctl.engine.nets.base import Net, body_of
from mamlctl.engine.nets.batch_norm import NormPass, Params


@dataclass(frozen=True)
class Leaves:
    """The tensors to differentiate with respect to: each task's weights, and the norm row of the pass."""

    fast: Params
    rows: Params

    @classmethod
    def of(cls, fast: Mapping[str, Tensor], norm: NormPass) -> Leaves:
        """Detach the tensors, so that the graph of the pass ends at them."""
        return cls(
            {name: weight.detach().requires_grad_() for name, weight in fast.items()},
            {name: norm.row(name).detach().requires_grad_() for name in norm.params},
        )

    @property
    def all(self) -> list[Tensor]:
        """The weights, then the rows."""
        return [*self.fast.values(), *self.rows.values()]

    def rows_as_params(self) -> Params:
        """Return the rows with an axis R = 1, as `NormPass` reads them."""
        return {name: row.unsqueeze(0) for name, row in self.rows.items()}

    def named(self, values: Sequence[Tensor]) -> tuple[Params, Params]:
        """Split values in the order of `all` into dictionaries for the weights and for the rows."""
        split = len(self.fast)
        by_fast = dict(zip(self.fast, values[:split], strict=True))
        return by_fast, dict(zip(self.rows, values[split:], strict=True))


@dataclass(frozen=True)
class AutogradTape:
    """The autograd graph of a gradient."""

    leaves: Leaves
    by_fast: Params

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Differentiate <grad_w L, direction>: with respect to w this is H u, as H is symmetric."""
        # A gradient without a graph is constant, such as that of a bias with a linear loss.
        outputs = {name: grad for name, grad in self.by_fast.items() if grad.requires_grad}
        if not outputs:
            return self.leaves.named([torch.zeros_like(leaf) for leaf in self.leaves.all])
        along = [direction[name] for name in outputs]
        products = torch.autograd.grad(
            list(outputs.values()), self.leaves.all, along, materialize_grads=True, retain_graph=True
        )
        return self.leaves.named(products)


@dataclass(frozen=True)
class AutogradBodyTape:
    """The autograd graph of the features."""

    leaves: Leaves
    f_TEF: Tensor

    def back_through(self, g_TEF: Tensor) -> tuple[Params, Params]:
        return self.leaves.named(torch.autograd.grad(self.f_TEF, self.leaves.all, g_TEF))


@dataclass(frozen=True)
class AutogradSet:
    """A set of examples; autograd needs no preparation."""

    net: Net
    x_TECHW: Tensor
    y_TE: Tensor

    def logits(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        with torch.no_grad():
            return self.net(fast, self.x_TECHW, norm)

    def gradient(self, fast: Mapping[str, Tensor], norm: NormPass, *, keep: bool = False) -> Gradient:
        leaves = Leaves.of(fast, norm)
        with torch.enable_grad():
            norm_by_leaves = replace(norm, params=leaves.rows_as_params())  # shares `norm.seen`
            logits_TEN = self.net(leaves.fast, self.x_TECHW, norm_by_leaves)
            loss_T = self.net.objective.loss(logits_TEN, self.y_TE)
            # Tasks share no fast weights, so the gradient of the summed loss contains each task's own one.
            grads = torch.autograd.grad(loss_T.sum(), leaves.all, create_graph=keep)
        by_fast, by_norm = leaves.named(grads)
        tape = AutogradTape(leaves, by_fast) if keep else None
        detached, rows = ({name: g.detach() for name, g in part.items()} for part in (by_fast, by_norm))
        return Gradient(loss_T.detach(), logits_TEN.detach(), detached, rows, tape)

    def features(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        with torch.no_grad():
            return self.net.features(fast, self.x_TECHW, norm)

    def features_and_tape(
        self, fast: Mapping[str, Tensor], norm: NormPass
    ) -> tuple[Tensor, AutogradBodyTape]:
        leaves = Leaves.of(body_of(fast), norm)
        with torch.enable_grad():
            norm_by_leaves = replace(norm, params=leaves.rows_as_params())  # shares `norm.seen`
            f_TEF = self.net.features(leaves.fast, self.x_TECHW, norm_by_leaves)
        return f_TEF.detach(), AutogradBodyTape(leaves, f_TEF)


@dataclass(frozen=True)
class Autograd:
    """Derivatives of any network by torch.autograd."""

    net: Net

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> AutogradSet:
        """Store the set; `measured` is not needed, because `NormPass.support_examples` has the same value."""
        return AutogradSet(self.net, x_TECHW, y_TE)
