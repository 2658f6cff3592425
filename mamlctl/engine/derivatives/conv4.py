"""Derivatives of Conv4 by hand: blocks one after another, then the linear head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.derivatives.interface import Gradient
from mamlctl.engine.kernels.block import Tape, TorchTape
from mamlctl.engine.nets.base import SLOPES
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics
from mamlctl.engine.nets.conv4 import Conv4


@dataclass(frozen=True)
class PreparedSet:
    """A set with tasks and channels on one axis, and what else the first block wants of it."""

    x: Tensor  # [E, T * C, H, W]
    y_TE: Tensor
    extra: Any  # made by Blocks.prepare
    measured: int | None  # how many leading examples give the statistics; None: all


@dataclass(frozen=True)
class Head:
    """The linear layer and the softmax: first and second derivatives of the cross-entropy."""

    f_TEF: Tensor
    weight_TNF: Tensor
    bias_TN: Tensor
    y_TE: Tensor

    def logits(self) -> Tensor:
        """Class scores -> logits_TEN."""
        return torch.baddbmm(self.bias_TN.unsqueeze(1), self.f_TEF, self.weight_TNF.transpose(1, 2))

    def loss_and_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """Class scores, one loss per task, and the gradient of the losses' sum by the class scores."""
        logits_TEN = self.logits()
        log_p_TEN = F.log_softmax(logits_TEN, -1)
        right_TE1 = self.y_TE.unsqueeze(-1)
        loss_T = -log_p_TEN.gather(-1, right_TE1).mean((1, 2))
        g_TEN = log_p_TEN.exp().scatter_add_(
            -1, right_TE1, torch.full_like(right_TE1, -1, dtype=log_p_TEN.dtype)
        )
        return logits_TEN, loss_T, g_TEN / self.y_TE.shape[1]


@dataclass(frozen=True)
class BodyTape:
    """A forward pass through the blocks."""

    blocks: Sequence[Tape]
    norm_is_fast: bool  # whether every task has norm weights of its own


@dataclass
class Conv4Tape:
    """A forward pass of the whole network, and once it was differentiated what a product needs."""

    body: BodyTape
    head: Head
    g_TEN: Tensor | None = None  # by the class scores
    p_TEN: Tensor | None = None  # probabilities


MakeBlock = Callable[..., Any]  # that makes a Tape


@dataclass(frozen=True)
class Conv4Derivatives:
    """Derivatives of Conv4, held to the autograd ones by tests; `make_block` says in which arithmetic."""

    net: Conv4
    make_block: MakeBlock = TorchTape
    prepare_first: Callable[..., Any] = lambda x, tasks, measured: None

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> PreparedSet:
        """Tasks and channels on one axis, channels last."""
        tasks, examples, channels, height, width = x_TECHW.shape
        x = x_TECHW.permute(1, 0, 2, 3, 4).reshape(examples, tasks * channels, height, width)
        x = x.contiguous(memory_format=torch.channels_last)
        return PreparedSet(x, y_TE, self.prepare_first(x, tasks, measured), measured)

    def logits(self, fast: Mapping[str, Tensor], prepared: PreparedSet, norm: NormPass) -> Tensor:
        """Class scores -> logits_TEN."""
        return self._forward(fast, prepared, norm).head.logits()

    def gradient(
        self, fast: Mapping[str, Tensor], prepared: PreparedSet, norm: NormPass, *, keep: bool = False
    ) -> Gradient:
        """Forward and backward."""
        tape = self._forward(fast, prepared, norm)
        head = tape.head
        logits_TEN, loss_T, g_TEN = head.loss_and_gradient()
        grads, norm_grads = self.back_through(tape.body, g_TEN @ head.weight_TNF, keep=keep)
        grads |= _head_gradient(g_TEN, head.f_TEF)
        if keep:
            tape.g_TEN, tape.p_TEN = g_TEN, torch.softmax(logits_TEN, -1)
        return Gradient(loss_T, logits_TEN, grads, norm_grads, tape if keep else None)

    def features(
        self, fast: Mapping[str, Tensor], prepared: PreparedSet, norm: NormPass
    ) -> tuple[Tensor, BodyTape]:
        """Forward through the blocks."""
        tasks = len(prepared.y_TE)
        a, tapes = prepared.x, []
        for block in range(1, self.net.blocks + 1):
            name = f"norm{block}"
            given = None
            if norm.statistics is Statistics.RUNNING:
                given = norm.row(f"{name}.mean").repeat(tasks), norm.row(f"{name}.var").repeat(tasks)
            gamma_X, beta_X = (_per_task(part, tasks) for part in norm.affine(name, fast))
            tape = self.make_block(
                a,
                fast[f"conv{block}.weight"].flatten(0, 1),
                gamma_X,
                beta_X,
                leak=SLOPES[self.net.activation],
                groups=tasks,
                compute=self.net.compute,
                given=given,
                measured=prepared.measured,
                first=block == 1,
                extra=prepared.extra if block == 1 else None,
            )
            if given is None:
                mean, var = (values.view(tasks, -1) for values in tape.statistics)
                norm.saw(name, mean, var, tape.count)
            tapes.append(tape)
            a = tape.out
        f_TEF = self._features(a, tasks).to(fast["conv1.weight"].dtype)
        return f_TEF, BodyTape(tapes, "norm1.weight" in fast)

    def back_through(self, tape: BodyTape, g_TEF: Tensor, *, keep: bool = False) -> tuple[Params, Params]:
        """Backward through the blocks; `keep` what their tangents need."""
        grads: Params = {}
        norm_grads: Params = {}
        ga = self._map(g_TEF)
        for block in range(self.net.blocks, 0, -1):
            part = tape.blocks[block - 1].backward(ga, keep=keep)
            grads[f"conv{block}.weight"] = part.weight.view(len(g_TEF), -1, *part.weight.shape[1:])
            for kind, grad_X in (("weight", part.gamma_X), ("bias", part.beta_X)):
                grad_TC = grad_X.view(len(g_TEF), -1)
                if tape.norm_is_fast:
                    grads[f"norm{block}.{kind}"] = grad_TC
                else:
                    norm_grads[f"norm{block}.{kind}"] = grad_TC.sum(0)
            if part.x is not None:
                ga = part.x
        return grads, norm_grads

    def product(self, tape: Conv4Tape, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Forward tangent, then the backward pass's own tangent."""
        assert not tape.body.norm_is_fast, "no algorithm wants second derivatives by an adapted norm"
        a_t = None
        for block, part in enumerate(tape.body.blocks, 1):
            a_t = part.tangent(a_t, direction[f"conv{block}.weight"].flatten(0, 1))
        assert a_t is not None and tape.g_TEN is not None and tape.p_TEN is not None
        head, g_TEN, p_TEN = tape.head, tape.g_TEN, tape.p_TEN
        f_t_TEF, weight_t_TNF = self._features(a_t, len(p_TEN)).to(g_TEN.dtype), direction["linear.weight"]
        logits_t_TEN = torch.baddbmm(
            direction["linear.bias"].unsqueeze(1), f_t_TEF, head.weight_TNF.transpose(1, 2)
        ).baddbmm_(head.f_TEF, weight_t_TNF.transpose(1, 2))
        mean = (p_TEN * logits_t_TEN).sum(-1, keepdim=True)
        g_t_TEN = p_TEN * (logits_t_TEN - mean) / p_TEN.shape[1]
        grads = _head_gradient(g_t_TEN, head.f_TEF)
        grads["linear.weight"].baddbmm_(g_TEN.transpose(1, 2), f_t_TEF)
        norm_grads: Params = {}
        ga_t, other = self._map(torch.baddbmm(g_t_TEN @ head.weight_TNF, g_TEN, weight_t_TNF)), None
        for block in range(self.net.blocks, 0, -1):
            gradient = tape.body.blocks[block - 1].tangent_backward(ga_t, other)
            grads[f"conv{block}.weight"] = gradient.weight.view(len(p_TEN), -1, *gradient.weight.shape[1:])
            norm_grads[f"norm{block}.weight"] = gradient.gamma_X.view(len(p_TEN), -1).sum(0)
            norm_grads[f"norm{block}.bias"] = gradient.beta_X.view(len(p_TEN), -1).sum(0)
            if gradient.x is not None:
                ga_t, other = gradient.x, gradient.x_2
        return grads, norm_grads

    def _forward(self, fast: Mapping[str, Tensor], prepared: PreparedSet, norm: NormPass) -> Conv4Tape:
        f_TEF, body = self.features(fast, prepared, norm)
        return Conv4Tape(body, Head(f_TEF, fast["linear.weight"], fast["linear.bias"], prepared.y_TE))

    def _features(self, a: Tensor, tasks: int) -> Tensor:
        """The last block's output as the head reads it."""
        examples, _, height, width = a.shape
        a_ETCHW = a.view(examples, tasks, self.net.filters, height, width)
        return a_ETCHW.transpose(0, 1).flatten(2)

    def _map(self, f_TEF: Tensor) -> Tensor:
        """The reverse of `_features`, for gradients."""
        _, height, width = self.net.image_shape
        height, width = height >> self.net.blocks, width >> self.net.blocks
        examples = f_TEF.shape[1]
        f_EXHW = f_TEF.transpose(0, 1).reshape(examples, -1, height, width)
        return f_EXHW.contiguous(memory_format=torch.channels_last)


def _per_task(part: Tensor, tasks: int) -> Tensor:
    """Norm weights, _C of all tasks or _TC of each, on the axis of tasks and channels."""
    return part.repeat(tasks) if part.dim() == 1 else part.flatten()


def _head_gradient(g_TEN: Tensor, f_TEF: Tensor) -> Params:
    return {"linear.weight": g_TEN.transpose(1, 2) @ f_TEF, "linear.bias": g_TEN.sum(1)}
