"""The linear layer and the softmax cross-entropy, with hand-written first and second derivatives.

With f the features, logits = W f + b and p = softmax(logits), a task's loss is the mean of -log p[y] over its
E examples, and with g = (p - onehot(y)) / E

    dL/dlogits = g        dL/dW = g^T f        dL/db = sum of g over examples        dL/df = g W

The tangents (suffix _t) along f_t, W_t and b_t are, by the product rule,

    logits_t = W f_t + W_t f + b_t        g_t = p (logits_t - <p, logits_t>) / E
    (dL/dW)_t = g_t^T f + g^T f_t        (dL/db)_t = sum of g_t        (dL/df)_t = g_t W + g W_t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.nets.base import Loss

MakeHead = Callable[[Tensor, Tensor, Tensor, Tensor], "TorchHead"]  # the arguments of `TorchHead`


@dataclass(frozen=True)
class HeadGradient:
    """Loss and gradients of the head, or tangents of the gradients."""

    ga: Tensor  # of the last block's output, in its layout
    weight_TNF: Tensor
    bias_TN: Tensor


class TorchHead:
    """The head at one set of features and weights, in torch operations: the reference for the kernels."""

    def __init__(self, a: Tensor, weight_TNF: Tensor, bias_TN: Tensor, y_TE: Tensor) -> None:
        """Compute nothing yet.

        Args:
            a: the output of the last block, [E, T * C, H, W], channels last.
            weight_TNF: the weights of the linear layer.
            bias_TN: its biases.
            y_TE: the labels.
        """
        self.a, self.weight_TNF, self.bias_TN, self.y_TE = a, weight_TNF, bias_TN, y_TE

    @cached_property
    def f_TEF(self) -> Tensor:
        """The features."""
        return features_of(self.a, len(self.weight_TNF)).to(self.weight_TNF.dtype)

    @cached_property
    def logits_TEN(self) -> Tensor:
        """The class scores."""
        return torch.baddbmm(self.bias_TN.unsqueeze(1), self.f_TEF, self.weight_TNF.transpose(1, 2))

    @cached_property
    def loss_T(self) -> Tensor:
        """The loss of each task."""
        return -self.log_p_TEN.gather(-1, self.y_TE.unsqueeze(-1)).mean((1, 2))

    @cached_property
    def score_T(self) -> Tensor | None:
        """The fraction of examples whose correct class has the largest score, if it is known."""
        return None

    @cached_property
    def log_p_TEN(self) -> Tensor:
        """The logarithms of the class probabilities."""
        return F.log_softmax(self.logits_TEN, -1)

    def by_logits(self, *, keep: bool) -> Tensor:
        """Compute dL/dlogits -> g_TEN; `keep` what its tangent needs."""
        right_TE1 = self.y_TE.unsqueeze(-1)
        p_TEN = self.log_p_TEN.exp()
        g_TEN = p_TEN.scatter_add_(-1, right_TE1, torch.full_like(right_TE1, -1, dtype=p_TEN.dtype))
        if keep:
            self.p_TEN = torch.softmax(self.logits_TEN, -1)
        return g_TEN / self.y_TE.shape[1]

    def by_logits_tangent(self, logits_t_TEN: Tensor) -> Tensor:
        """Compute the tangent of dL/dlogits along one of the logits, after `by_logits` with `keep`."""
        p_TEN = self.p_TEN
        mean = (p_TEN * logits_t_TEN).sum(-1, keepdim=True)
        return p_TEN * (logits_t_TEN - mean) / p_TEN.shape[1]

    def gradient(self, *, keep: bool) -> HeadGradient:
        """Compute the gradients; `keep` what `tangent` needs."""
        g_TEN = self.by_logits(keep=keep)
        if keep:
            self.g_TEN = g_TEN
        ga = as_map(g_TEN @ self.weight_TNF, self.a)
        return HeadGradient(ga, g_TEN.transpose(1, 2) @ self.f_TEF, g_TEN.sum(1))

    def tangent(self, a_t: Tensor, weight_t_TNF: Tensor, bias_t_TN: Tensor) -> HeadGradient:
        """Compute the tangents of the gradients, after `gradient` with `keep`.

        Args:
            a_t: the direction of the last block's output.
            weight_t_TNF: that of the weights.
            bias_t_TN: that of the biases.
        """
        g_TEN = self.g_TEN
        f_t_TEF = features_of(a_t, len(self.weight_TNF)).to(g_TEN.dtype)
        logits_t_TEN = torch.baddbmm(
            bias_t_TN.unsqueeze(1), f_t_TEF, self.weight_TNF.transpose(1, 2)
        ).baddbmm_(self.f_TEF, weight_t_TNF.transpose(1, 2))
        g_t_TEN = self.by_logits_tangent(logits_t_TEN)
        weight_TNF = g_t_TEN.transpose(1, 2) @ self.f_TEF
        weight_TNF.baddbmm_(g_TEN.transpose(1, 2), f_t_TEF)
        ga_t = as_map(torch.baddbmm(g_t_TEN @ self.weight_TNF, g_TEN, weight_t_TNF), self.a)
        return HeadGradient(ga_t, weight_TNF, g_t_TEN.sum(1))


class LossHead(TorchHead):
    """The head with any loss, whose derivatives by the logits come from torch.autograd."""

    def __init__(self, a: Tensor, weight_TNF: Tensor, bias_TN: Tensor, y_TE: Tensor, *, loss: Loss) -> None:
        """Compute nothing yet; arguments as in `TorchHead`, and the loss."""
        super().__init__(a, weight_TNF, bias_TN, y_TE)
        self._loss = loss

    @cached_property
    def _leaf_TEN(self) -> Tensor:
        """The logits, at which the graph of the loss ends."""
        return self.logits_TEN.detach().requires_grad_()

    @cached_property
    def _graph_T(self) -> Tensor:
        """The loss of each task, with its graph."""
        with torch.enable_grad():
            return self._loss(self._leaf_TEN, self.y_TE)

    @cached_property
    def loss_T(self) -> Tensor:
        return self._graph_T.detach()

    def by_logits(self, *, keep: bool) -> Tensor:
        with torch.enable_grad():
            # Tasks share no logits, so the gradient of the summed loss contains each task's own one.
            (graph_TEN,) = torch.autograd.grad(
                self._graph_T.sum(), self._leaf_TEN, create_graph=keep, retain_graph=keep
            )
        if keep:
            self._by_logits_TEN = graph_TEN
        return graph_TEN.detach()

    def by_logits_tangent(self, logits_t_TEN: Tensor) -> Tensor:
        graph_TEN = self._by_logits_TEN
        if not graph_TEN.requires_grad:  # the loss is linear
            return torch.zeros_like(logits_t_TEN)
        # The Hessian is symmetric, so its product with the direction is a gradient.
        (product,) = torch.autograd.grad(
            graph_TEN, self._leaf_TEN, logits_t_TEN, retain_graph=True, materialize_grads=True
        )
        return product


def features_of(a: Tensor, tasks: int) -> Tensor:
    """Reshape the last block's output [E, T * C, H, W] to the head's input f_TEF."""
    examples, channels, height, width = a.shape
    return a.view(examples, tasks, channels // tasks, height, width).transpose(0, 1).flatten(2)


def as_map(f_TEF: Tensor, like: Tensor) -> Tensor:
    """Invert `features_of`, for a block's output in the shape of `like`."""
    return f_TEF.transpose(0, 1).reshape(like.shape).contiguous(memory_format=torch.channels_last)
