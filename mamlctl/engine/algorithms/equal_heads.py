"""Two variants of MAML whose head starts equal for all classes, so that the order of labels has no effect.

MAML's head starts with another row per class, but which class of a task gets which row is arbitrary: its
accuracy depends on the order of the labels (Ye & Chao 2022, arXiv:2106.16245).

- UNICORN-MAML (the same paper) learns one vector w and bias b that all rows of the head start from.
  By the chain rule their gradients are the sums over the rows.
- The zeroing trick (Kao et al. 2022, arXiv:2106.15367) starts every inner loop from a head of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, Outer
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import HEAD, Net
from mamlctl.engine.nets.batch_norm import Params


def equal_rows(weights: Params) -> Params:
    """The head with all rows equal to its first."""
    return {name: weights[name][:1].expand_as(weights[name]).clone() for name in HEAD}


@dataclass(frozen=True)
class EqualHead:
    """The meta-gradient of `outer` for a head that starts equal for all classes."""

    outer: Outer
    zeros: bool  # the head stays zero; otherwise its rows have one common gradient

    def __call__(
        self, net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest
    ) -> MetaStepResult:
        """Compute the meta-gradient; arguments and result as in `Outer`.

        Every row gets the whole gradient of the common vector. Equal rows with equal gradients stay equal,
        and Adam does not depend on the scale.
        """
        result = self.outer(net, state, episodes, request)
        learnt = [name for name in HEAD if name in result.grads]
        grads = result.grads | {name: self._head_gradient(result.grads[name]) for name in learnt}
        return replace(result, grads=grads)

    def _head_gradient(self, grad_N: Tensor) -> Tensor:
        if self.zeros:
            return torch.zeros_like(grad_N)
        return grad_N.sum(0, keepdim=True).expand_as(grad_N).clone()
