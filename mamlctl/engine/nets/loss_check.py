"""Checks of the user's loss before training, on random examples: what cannot work is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mamlctl.core.errors import is_out_of_memory
from mamlctl.core.user_code.importing import errors_of_user_code
from mamlctl.engine.nets.losses import OwnLoss

MOST_EXAMPLES = 64  # with which a function is tried
# Largest relative difference between losses that are equal up to rounding, in float64.
SAME = 1e-9
HINT_TWICE = "use operations that torch can differentiate twice, or --first-order"
HINT_GRAPH = "compute it from the outputs by torch's operations, without detach, argmax or numpy"


def check_loss(
    loss: OwnLoss, outputs: Sequence[int], like: Tensor, *, has_classes: bool, second_order: bool
) -> None:
    """Try a loss on random examples, in float64 on the CPU and then as the run will use it.

    Args:
        loss: the loss.
        outputs: the numbers of outputs with which it will be used.
        like: a tensor of the device and dtype of the run.
        has_classes: whether targets are labels, not values.
        second_order: whether the meta-gradient needs second derivatives.

    Raises:
        SettingsError: the function fails or cannot be used as a loss.
    """
    if isinstance(loss.code.function, type):
        raise loss.unusable("is a class, not a function", "name an instance of it, or a function")
    for count in outputs:
        outputs_XN, targets = _examples(count, has_classes)
        _check_values(loss, outputs_XN, targets)
        _check_derivatives(loss, outputs_XN, targets, second_order)
        moved_XN = outputs_XN.to(like).requires_grad_()
        targets = targets.to(like if targets.is_floating_point() else like.device)
        if not bool(loss.of_examples(moved_XN, targets).isfinite().all()):
            raise loss.unusable(f"returns a loss that is not finite in {like.dtype}")


def _examples(count: int, has_classes: bool) -> tuple[Tensor, Tensor]:
    """Random outputs _XN, and labels _X of as many classes as possible or values _XN."""
    generator = torch.Generator().manual_seed(0)
    examples = min(count, MOST_EXAMPLES) + 3
    outputs_XN = torch.randn(examples, count, generator=generator, dtype=torch.float64)
    if has_classes:
        return outputs_XN, torch.arange(examples).remainder(count)
    return outputs_XN, torch.randn(outputs_XN.shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _check_values(loss: OwnLoss, outputs_XN: Tensor, targets: Tensor) -> None:
    """Raise SettingsError unless the losses are finite, repeatable, and each of its own example only."""
    given_XN, given = outputs_XN.clone(), targets.clone()
    losses_X = loss.of_examples(given_XN, given)
    if not (torch.equal(given_XN, outputs_XN) and torch.equal(given, targets)):
        raise loss.unusable("changes its arguments", "compute new tensors, without operations in place")
    if not bool(losses_X.isfinite().all()):
        raise loss.unusable("returns a loss that is not finite for random outputs", "correct the function")
    if not torch.equal(losses_X, loss.of_examples(outputs_XN.clone(), targets.clone())):
        fact = "returns other losses when it is called again with the same arguments"
        raise loss.unusable(fact, "remove random numbers and state from it")
    alone = [
        loss.of_examples(outputs_XN[row : row + 1].clone(), targets[row : row + 1].clone())
        for row in range(len(targets))
    ]
    scale = 1 + float(losses_X.abs().max())
    if not bool(((torch.cat(alone) - losses_X).abs() <= SAME * scale).all()):
        fact = "returns another loss for an example if other examples are given with it"
        raise loss.unusable(fact, "compute each loss from one row of the outputs and of the targets only")


def _check_derivatives(loss: OwnLoss, outputs_XN: Tensor, targets: Tensor, second_order: bool) -> None:
    """Raise SettingsError unless the losses have finite derivatives by the outputs."""
    leaf_XN = outputs_XN.clone().requires_grad_()
    losses_X = loss.of_examples(leaf_XN, targets.clone())
    if not losses_X.requires_grad:
        raise loss.unusable("returns losses without a gradient", HINT_GRAPH)
    # Weights that require gradients: a function without a second derivative raises an error only then.
    weights_X = torch.ones_like(losses_X).requires_grad_()
    with _derivative(loss, "first", HINT_GRAPH):
        (grad_XN,) = torch.autograd.grad(losses_X, leaf_XN, weights_X, create_graph=True)
    _check_finite(loss, grad_XN, "first", HINT_GRAPH)
    if not bool(grad_XN.any()):
        raise loss.unusable("returns losses that do not depend on the outputs", HINT_GRAPH)
    if second_order:
        with _derivative(loss, "second", HINT_TWICE):
            # Not for chosen inputs, which would skip the node that raises the error.
            torch.autograd.backward(grad_XN, grad_XN.detach())
        if leaf_XN.grad is not None:
            _check_finite(loss, leaf_XN.grad, "second", HINT_TWICE)


@contextmanager
def _derivative(loss: OwnLoss, order: str, hint: str) -> Iterator[None]:
    """Raise SettingsError if there is no derivative of an order, or if the user's backward pass fails.

    Args:
        loss: the loss.
        order: of the derivative that is computed in the block.
        hint: what to do about it.
    """
    with errors_of_user_code(loss.code.root, loss.code.place):
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0]
            raise loss.unusable(f"has no {order} derivative: {why}", hint) from error


def _check_finite(loss: OwnLoss, grad_XN: Tensor, order: str, hint: str) -> None:
    if not bool(grad_XN.isfinite().all()):
        raise loss.unusable(f"has a {order} derivative that is not finite for random outputs", hint)
