"""Hand-written derivatives of Conv4: four blocks (see kernels/block.py), then the linear head.

A Hessian-vector product is the tangent (forward-mode derivative) of the backward pass along the direction
(Pearlmutter 1994, "Fast exact multiplication by the Hessian"). It takes two sweeps: the tangents of all
forward values from the first block to the loss, then the tangents of all gradients from the loss to the first
block. The suffix _t denotes the tangent of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.derivatives.interface import Gradient
from mamlctl.engine.kernels.block import BlockSettings, BlockTape, MakeBlock, Planes, TorchTape
from mamlctl.engine.kernels.convolutions import Direct, MakeConvolution
from mamlctl.engine.nets.base import SLOPES
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.flat import Flat

NORM = ("weight", "bias")  # of a batch-norm layer, in the order of `batch_norm.init_params`

PrepareFirst = Callable[[Tensor, int, int | None], Planes | None]  # examples, tasks, `measured`


def unprepared(x: Tensor, tasks: int, measured: int | None) -> None:
    """Prepare nothing, for a first block that reads the examples; arguments as in `PrepareFirst`."""


@dataclass(frozen=True)
class Head:
    """The linear layer and the softmax cross-entropy at one set of features and weights."""

    f_TEF: Tensor
    weight_TNF: Tensor
    bias_TN: Tensor
    y_TE: Tensor

    def logits(self) -> Tensor:
        return torch.baddbmm(self.bias_TN.unsqueeze(1), self.f_TEF, self.weight_TNF.transpose(1, 2))

    def loss_and_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the cross-entropy and its gradient with respect to the class scores.

        With p = softmax(logits), a task's loss is the mean of -log p[y] over its E examples, and the gradient
        is (p - onehot(y)) / E.

        Returns:
            logits_TEN, loss_T and the gradient, _TEN.
        """
        logits_TEN = self.logits()
        log_p_TEN = F.log_softmax(logits_TEN, -1)
        right_TE1 = self.y_TE.unsqueeze(-1)
        loss_T = -log_p_TEN.gather(-1, right_TE1).mean((1, 2))
        g_TEN = log_p_TEN.exp().scatter_add_(
            -1, right_TE1, torch.full_like(right_TE1, -1, dtype=log_p_TEN.dtype)
        )
        return logits_TEN, loss_T, g_TEN / self.y_TE.shape[1]


@dataclass(frozen=True)
class Conv4BodyTape:
    """The intermediate results of a forward pass through the blocks."""

    net: Conv4
    blocks: Sequence[BlockTape]
    tasks: int
    norm_is_fast: bool  # whether batch norm's weights are among the fast weights, one set per task

    def back_through(self, g_TEF: Tensor, *, keep: bool = False) -> tuple[Params, Params]:
        """Backpropagate as in `BodyTape`; `keep` the intermediate results that tangents need."""
        grads: Params = {}
        norm_grads: dict[str, Tensor] = {}
        ga = _map(self.net, g_TEF)
        for block in range(self.net.blocks, 0, -1):
            gradient = self.blocks[block - 1].backward(ga, keep=keep)
            grads[f"conv{block}.weight"] = self.by_task(gradient.weight)
            norm_grads[f"norm{block}.weight"] = gradient.gamma_X
            norm_grads[f"norm{block}.bias"] = gradient.beta_X
            if gradient.x is not None:
                ga = gradient.x
        if self.norm_is_fast:
            return grads | {name: grad_X.view(self.tasks, -1) for name, grad_X in norm_grads.items()}, {}
        return grads, self.of_all_tasks(norm_grads, g_TEF.dtype)

    def of_all_tasks(self, norm_grads: Mapping[str, Tensor], dtype: torch.dtype) -> Flat:
        """Add the gradients of batch norm's weights, then biases, over tasks: _X -> _C."""
        names = [f"norm{block}.{kind}" for kind in NORM for block in range(1, self.net.blocks + 1)]
        grad_LTC = torch.stack([norm_grads[name] for name in names]).view(len(names), self.tasks, -1)
        grad_LC = grad_LTC.sum(1, dtype=dtype)
        return Flat(grad_LC.flatten(), dict.fromkeys(names, grad_LC.shape[1:]))

    def by_task(self, weight: Tensor) -> Tensor:
        """[T * O, C, 3, 3] -> _TOCHW."""
        return weight.view(self.tasks, -1, *weight.shape[1:])


@dataclass(frozen=True)
class Conv4Tape:
    """The intermediate results of a forward and backward pass through the whole network."""

    body: Conv4BodyTape
    head: Head
    g_TEN: Tensor  # gradient with respect to the class scores
    p_TEN: Tensor  # class probabilities

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Compute the tangents of the forward pass, then those of the backward pass."""
        body, head, g_TEN, p_TEN = self.body, self.head, self.g_TEN, self.p_TEN
        # The algorithms that adapt batch norm (Reptile, transfer, scratch) use first derivatives only.
        assert not body.norm_is_fast, "second derivatives are not implemented for an adapted batch norm"
        # The image has no tangent.
        a_t = None
        for block, tape in enumerate(body.blocks, 1):
            a_t = tape.tangent(a_t, direction[f"conv{block}.weight"].flatten(0, 1))
        assert a_t is not None
        # Head, forward: logits = W f + b, so logits_t = W f_t + W_t f + b_t.
        f_t_TEF = _features(body.net, a_t, body.tasks).to(g_TEN.dtype)
        weight_t_TNF = direction["linear.weight"]
        logits_t_TEN = torch.baddbmm(
            direction["linear.bias"].unsqueeze(1), f_t_TEF, head.weight_TNF.transpose(1, 2)
        ).baddbmm_(head.f_TEF, weight_t_TNF.transpose(1, 2))
        # Softmax: p_t = p (logits_t - <p, logits_t>), and g = (p - onehot(y)) / E, so g_t = p_t / E.
        mean = (p_TEN * logits_t_TEN).sum(-1, keepdim=True)
        g_t_TEN = p_TEN * (logits_t_TEN - mean) / p_TEN.shape[1]
        # Head, backward: dL/dW = g^T f, so its tangent is g_t^T f + g^T f_t.
        grads = _head_gradient(g_t_TEN, head.f_TEF)
        grads["linear.weight"].baddbmm_(g_TEN.transpose(1, 2), f_t_TEF)
        norm_grads: dict[str, Tensor] = {}
        # dL/df = g W, so its tangent is g_t W + g W_t.
        ga_t = _map(body.net, torch.baddbmm(g_t_TEN @ head.weight_TNF, g_TEN, weight_t_TNF))
        other = None  # the second summand of ga_t, see BlockGradient.x_2
        for block in range(body.net.blocks, 0, -1):
            gradient = body.blocks[block - 1].tangent_backward(ga_t, other)
            grads[f"conv{block}.weight"] = body.by_task(gradient.weight)
            norm_grads[f"norm{block}.weight"] = gradient.gamma_X
            norm_grads[f"norm{block}.bias"] = gradient.beta_X
            if gradient.x is not None:
                ga_t, other = gradient.x, gradient.x_2
        return grads, body.of_all_tasks(norm_grads, g_TEN.dtype)


@dataclass(frozen=True)
class Conv4Set:
    """A set with tasks and channels on one axis, and its planes if the first block reads them."""

    net: Conv4
    make_block: MakeBlock
    make_conv: MakeConvolution
    x: Tensor  # [E, T * C, H, W], channels last
    y_TE: Tensor
    planes: Planes | None
    measured: int | None  # how many leading examples the statistics come from; None for all

    def logits(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        return _head(self.features(fast, norm), fast, self.y_TE).logits()

    def gradient(self, fast: Mapping[str, Tensor], norm: NormPass, *, keep: bool = False) -> Gradient:
        f_TEF, body = self.features_and_tape(fast, norm)
        head = _head(f_TEF, fast, self.y_TE)
        logits_TEN, loss_T, g_TEN = head.loss_and_gradient()
        grads, norm_grads = body.back_through(g_TEN @ head.weight_TNF, keep=keep)
        grads |= _head_gradient(g_TEN, head.f_TEF)
        tape = Conv4Tape(body, head, g_TEN, torch.softmax(logits_TEN, -1)) if keep else None
        return Gradient(loss_T, logits_TEN, grads, norm_grads, tape)

    def features(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        a = self.x
        for block in range(1, self.net.blocks + 1):
            # The tape of a block is released before the next one, so that its memory is used again.
            a = self._block(block, a, fast, norm, forward_only=True).out
        return self._by_task(a, fast)

    def features_and_tape(self, fast: Mapping[str, Tensor], norm: NormPass) -> tuple[Tensor, Conv4BodyTape]:
        a, tapes = self.x, []
        for block in range(1, self.net.blocks + 1):
            tapes.append(self._block(block, a, fast, norm, forward_only=False))
            a = tapes[-1].out
        tape = Conv4BodyTape(self.net, tapes, len(self.y_TE), "norm1.weight" in fast)
        return self._by_task(a, fast), tape

    def _block(
        self, block: int, a: Tensor, fast: Mapping[str, Tensor], norm: NormPass, *, forward_only: bool
    ) -> BlockTape:
        """Pass the output `a` of the block before through block number `block`, counted from 1."""
        tasks, name = len(self.y_TE), f"norm{block}"
        stored = None
        if norm.statistics is Statistics.RUNNING:
            stored = norm.row(f"{name}.mean").repeat(tasks), norm.row(f"{name}.var").repeat(tasks)
        settings = BlockSettings(
            groups=tasks,
            compute=self.net.compute,
            first=block == 1,
            statistics=stored,
            measured=self.measured,
            leak=SLOPES[self.net.activation],
            make_conv=self.make_conv,
            planes=self.planes if block == 1 else None,
            forward_only=forward_only,
        )
        gamma_X, beta_X = (
            # _C, shared by all tasks, or _TC -> _X with X = T * C.
            part.flatten()
            for part in norm.affine(name, fast)
        )
        tape = self.make_block(a, fast[f"conv{block}.weight"].flatten(0, 1), gamma_X, beta_X, settings)
        if stored is None:
            mean_X, var_X = tape.seen
            norm.saw(name, mean_X.view(tasks, -1), var_X.view(tasks, -1), tape.count)
        return tape

    def _by_task(self, a: Tensor, fast: Mapping[str, Tensor]) -> Tensor:
        """Reshape the output of the last block to f_TEF, in the dtype of the weights."""
        return _features(self.net, a, len(self.y_TE)).to(fast["conv1.weight"].dtype)


@dataclass(frozen=True)
class Conv4Derivatives:
    """Derivatives of Conv4; `make_block` chooses torch, C or Triton. Tests compare them with `Autograd`."""

    net: Conv4
    make_block: MakeBlock = TorchTape
    prepare_first: PrepareFirst = unprepared
    make_conv: MakeConvolution = Direct  # of the blocks in C

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> Conv4Set:
        """Merge task and channel axes, so that a convolution in T groups gives each task its own weights."""
        tasks, examples, channels, height, width = x_TECHW.shape
        x = x_TECHW.permute(1, 0, 2, 3, 4).reshape(examples, tasks * channels, height, width)
        x = x.contiguous(memory_format=torch.channels_last)
        planes = self.prepare_first(x, tasks, measured)
        return Conv4Set(self.net, self.make_block, self.make_conv, x, y_TE, planes, measured)


def _head(f_TEF: Tensor, fast: Mapping[str, Tensor], y_TE: Tensor) -> Head:
    return Head(f_TEF, fast["linear.weight"], fast["linear.bias"], y_TE)


def _features(net: Conv4, a: Tensor, tasks: int) -> Tensor:
    """Reshape the last block's output [E, T * C, H, W] to the head's input f_TEF."""
    examples, _, height, width = a.shape
    a_ETCHW = a.view(examples, tasks, net.filters, height, width)
    return a_ETCHW.transpose(0, 1).flatten(2)


def _map(net: Conv4, f_TEF: Tensor) -> Tensor:
    """Invert `_features`."""
    f_EXHW = f_TEF.transpose(0, 1).reshape(f_TEF.shape[1], -1, *net.features_shape[1:])
    return f_EXHW.contiguous(memory_format=torch.channels_last)


def _head_gradient(g_TEN: Tensor, f_TEF: Tensor) -> Params:
    """Return dL/dW = g^T f and dL/db = sum of g over examples."""
    return {"linear.weight": g_TEN.transpose(1, 2) @ f_TEF, "linear.bias": g_TEN.sum(1)}
