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
from torch import Tensor

from mamlctl.engine.derivatives.interface import Gradient
from mamlctl.engine.kernels.block import BlockSettings, BlockTape, MakeBlock, Planes, TorchTape
from mamlctl.engine.kernels.convolutions import Direct, MakeConvolution
from mamlctl.engine.kernels.head import HeadGradient, MakeHead, TorchHead, as_map, features_of
from mamlctl.engine.nets.base import SLOPES
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics
from mamlctl.engine.nets.conv4 import Conv4
from mamlctl.engine.nets.flat import Flat

NORM = ("weight", "bias")  # of a batch-norm layer, in the order of `batch_norm.init_params`

PrepareFirst = Callable[[Tensor, int, int | None], Planes | None]  # examples, tasks, `measured`


def unprepared(x: Tensor, tasks: int, measured: int | None) -> None:
    """Prepare nothing, for a first block that reads the examples; arguments as in `PrepareFirst`."""


@dataclass(frozen=True)
class Conv4BodyTape:
    """The intermediate results of a forward pass through the blocks."""

    net: Conv4
    blocks: Sequence[BlockTape]
    tasks: int
    norm_is_fast: bool  # whether batch norm's weights are among the fast weights, one set per task

    def back_through(self, g_TEF: Tensor, *, keep: bool = False) -> tuple[Params, Params]:
        """Backpropagate as in `BodyTape`; `keep` the intermediate results that tangents need."""
        return self.back_from(as_map(g_TEF, self.blocks[-1].out), g_TEF.dtype, keep=keep)

    def back_from(self, ga: Tensor, dtype: torch.dtype, *, keep: bool) -> tuple[Params, Params]:
        """Do the same as `back_through`, from the gradient of the last block's output.

        Args:
            ga: the gradient, in the shape and layout of the output.
            dtype: of batch norm.
            keep: keep the intermediate results that tangents need.
        """
        grads: Params = {}
        norm_grads: dict[str, Tensor] = {}
        for block in range(self.net.blocks, 0, -1):
            gradient = self.blocks[block - 1].backward(ga, keep=keep)
            grads[f"conv{block}.weight"] = self.by_task(gradient.weight)
            norm_grads[f"norm{block}.weight"] = gradient.gamma_X
            norm_grads[f"norm{block}.bias"] = gradient.beta_X
            if gradient.x is not None:
                ga = gradient.x
        if self.norm_is_fast:
            by_task = {name: grad_X.view(self.tasks, -1).to(dtype) for name, grad_X in norm_grads.items()}
            return grads | by_task, {}
        return grads, self.of_all_tasks(norm_grads, dtype)

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
    head: TorchHead

    def product(self, direction: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """Compute the tangents of the forward pass, then those of the backward pass."""
        body, head = self.body, self.head
        # The algorithms that adapt batch norm (Reptile, transfer, scratch) use first derivatives only.
        assert not body.norm_is_fast, "second derivatives are not implemented for an adapted batch norm"
        # The image has no tangent.
        a_t = None
        for block, tape in enumerate(body.blocks, 1):
            a_t = tape.tangent(a_t, _filters(direction, block, body.net.compute).flatten(0, 1))
        assert a_t is not None
        of_head = head.tangent(a_t, direction["linear.weight"], direction["linear.bias"])
        grads: Params = {}
        norm_grads: dict[str, Tensor] = {}
        ga_t = of_head.ga
        other = None  # the second summand of ga_t, see BlockGradient.x_2
        for block in range(body.net.blocks, 0, -1):
            gradient = body.blocks[block - 1].tangent_backward(ga_t, other)
            grads[f"conv{block}.weight"] = body.by_task(gradient.weight)
            norm_grads[f"norm{block}.weight"] = gradient.gamma_X
            norm_grads[f"norm{block}.bias"] = gradient.beta_X
            if gradient.x is not None:
                ga_t, other = gradient.x, gradient.x_2
        grads |= _head_grads(of_head)
        return grads, body.of_all_tasks(norm_grads, head.weight_TNF.dtype)


@dataclass(frozen=True)
class Conv4Set:
    """A set with tasks and channels on one axis, and its planes if the first block reads them."""

    net: Conv4
    make_block: MakeBlock
    make_conv: MakeConvolution
    make_head: MakeHead
    x: Tensor  # [E, T * C, H, W], channels last
    y_TE: Tensor
    planes: Planes | None
    measured: int | None  # how many leading examples the statistics come from; None for all

    def logits(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        a = self._through_blocks(fast, norm)
        return self.make_head(a, fast["linear.weight"], fast["linear.bias"], self.y_TE).logits_TEN

    def gradient(self, fast: Mapping[str, Tensor], norm: NormPass, *, keep: bool = False) -> Gradient:
        body = self._taped(fast, norm)
        head = self.make_head(body.blocks[-1].out, fast["linear.weight"], fast["linear.bias"], self.y_TE)
        of_head = head.gradient(keep=keep)
        grads, norm_grads = body.back_from(of_head.ga, head.weight_TNF.dtype, keep=keep)
        grads |= _head_grads(of_head)
        tape = Conv4Tape(body, head) if keep else None
        return Gradient(head.loss_T, head.logits_TEN, grads, norm_grads, tape, head.score_T)

    def features(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        return self._features(self._through_blocks(fast, norm), fast)

    def features_and_tape(self, fast: Mapping[str, Tensor], norm: NormPass) -> tuple[Tensor, Conv4BodyTape]:
        body = self._taped(fast, norm)
        return self._features(body.blocks[-1].out, fast), body

    def _through_blocks(self, fast: Mapping[str, Tensor], norm: NormPass) -> Tensor:
        """Compute the output of the last block, without what derivatives need."""
        a = self.x
        for block in range(1, self.net.blocks + 1):
            # The tape of a block is released before the next one, so that its memory is used again.
            a = self._block(block, a, fast, norm, forward_only=True).out
        return a

    def _taped(self, fast: Mapping[str, Tensor], norm: NormPass) -> Conv4BodyTape:
        """Pass the examples through the blocks, with what derivatives need."""
        a, tapes = self.x, []
        for block in range(1, self.net.blocks + 1):
            tapes.append(self._block(block, a, fast, norm, forward_only=False))
            a = tapes[-1].out
        return Conv4BodyTape(self.net, tapes, len(self.y_TE), "norm1.weight" in fast)

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
        weight = _filters(fast, block, self.net.compute).flatten(0, 1)
        tape = self.make_block(a, weight, gamma_X, beta_X, settings)
        if stored is None:
            mean_X, var_X = tape.seen
            norm.saw(name, mean_X.view(tasks, -1), var_X.view(tasks, -1), tape.count)
        return tape

    def _features(self, a: Tensor, fast: Mapping[str, Tensor]) -> Tensor:
        """Reshape the output of the last block to f_TEF, in the dtype of the weights."""
        return features_of(a, len(self.y_TE)).to(fast["conv1.weight"].dtype)


@dataclass(frozen=True)
class Conv4Derivatives:
    """Derivatives of Conv4; `make_block` chooses torch, C or Triton. Tests compare them with `Autograd`."""

    net: Conv4
    make_block: MakeBlock = TorchTape
    prepare_first: PrepareFirst = unprepared
    make_conv: MakeConvolution = Direct  # of the blocks in C
    make_head: MakeHead = TorchHead

    def prepare(self, x_TECHW: Tensor, y_TE: Tensor, measured: int | None = None) -> Conv4Set:
        """Merge task and channel axes, so that a convolution in T groups gives each task its own weights."""
        tasks, examples, channels, height, width = x_TECHW.shape
        x = x_TECHW.permute(1, 0, 2, 3, 4).reshape(examples, tasks * channels, height, width)
        x = x.contiguous(memory_format=torch.channels_last)
        planes = self.prepare_first(x, tasks, measured)
        makers = self.make_block, self.make_conv, self.make_head
        return Conv4Set(self.net, *makers, x, y_TE, planes, measured)


def _filters(params: Mapping[str, Tensor], block: int, compute: torch.dtype | None) -> Tensor:
    """Return a block's filters; those in one buffer are cast together to the dtype of the products."""
    if isinstance(params, Flat) and compute is not None and block > 1:
        params = params.cast(compute)
    return params[f"conv{block}.weight"]


def _head_grads(of_head: HeadGradient) -> Params:
    return {"linear.weight": of_head.weight_TNF, "linear.bias": of_head.bias_TN}
