"""The losses of --loss: built-in ones, and the user's own function of single examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from mamlctl.core.errors import SettingsError
from mamlctl.core.formatting import with_article
from mamlctl.core.literals import TaskType
from mamlctl.core.user_code.importing import UserCode
from mamlctl.core.user_code.references import is_reference
from mamlctl.engine.nets.base import Loss, Objective, cross_entropy, objective_of, squared_error


def absolute_error(outputs_TEN: Tensor, y: Tensor) -> Tensor:
    """Mean of |output - y| over each task's examples and the N targets -> loss_T; arguments as in mse."""
    return (outputs_TEN - y.view_as(outputs_TEN)).abs().flatten(1).mean(1)


def huber(outputs_TEN: Tensor, y: Tensor) -> Tensor:
    """Mean of d^2/2 for |d| <= 1, and of |d| - 1/2 beyond, with d = output - y -> loss_T (Huber 1964)."""
    return F.huber_loss(outputs_TEN, y.view_as(outputs_TEN), reduction="none").flatten(1).mean(1)


BUILT_IN: Mapping[str, Loss] = {
    "cross_entropy": cross_entropy,
    "mse": squared_error,
    "mae": absolute_error,
    "huber": huber,
}


@dataclass(frozen=True)
class OwnLoss:
    """The mean over a task's examples of the user's loss.

    The function gets the examples of all tasks at once, which is exact, since the loss of an example depends
    on no other one (loss_check.py).
    """

    code: UserCode

    def __call__(self, outputs_TEN: Tensor, y: Tensor) -> Tensor:
        outputs_XN = outputs_TEN.flatten(0, 1)
        targets = y.reshape_as(outputs_XN).to(outputs_XN) if y.is_floating_point() else y.flatten()
        return self.of_examples(outputs_XN, targets).view(outputs_TEN.shape[:2]).mean(1)

    def of_examples(self, outputs_XN: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each of X examples.

        Args:
            outputs_XN: class scores or values.
            targets: labels _X, or values _XN.

        Returns:
            The losses, _X, in the dtype of the outputs.

        Raises:
            SettingsError: the function fails, or returns something else.
        """
        losses = self.code(outputs_XN, targets)
        if not isinstance(losses, Tensor):
            given = "None" if losses is None else with_article(type(losses).__name__)
            raise self.unusable(f"returns {given}, not a tensor")
        if losses.is_complex():
            raise self.unusable("returns complex numbers", "return real numbers")
        if losses.shape != outputs_XN.shape[:1]:
            shape, wanted = tuple(losses.shape), tuple(outputs_XN.shape[:1])
            fact = f"returns the shape {shape} for {wanted[0]} examples, not {wanted}"
            raise self.unusable(fact, "return one loss per example, without a mean or sum over examples")
        return losses.to(outputs_XN)

    def unusable(self, fact: str, hint: str = "return a tensor with one loss per example") -> SettingsError:
        """The error for a function that cannot be used, with its file and line."""
        return SettingsError([(f"{self.code.place}: {fact}", hint)])


def objective_with(
    shape: Sequence[int], loss: str | None, own: OwnLoss | None, task_type: TaskType | None = None
) -> Objective:
    """The objective of a network; with the default loss it is CLASSIFICATION or REGRESSION itself.

    Args:
        shape: C, H, W of images, or D of points.
        loss: the --loss setting.
        own: the user's loss, if the setting names one.
        task_type: of the user's own tasks.
    """
    usual = objective_of(shape, task_type)
    if loss is None:
        return usual
    if is_reference(loss):
        assert own is not None, f"--loss {loss} needs its code"
        return replace(usual, loss=own)
    return usual if BUILT_IN[loss] is usual.loss else replace(usual, loss=BUILT_IN[loss])
