"""An inner loop without a graph, and what is measured along it."""

from __future__ import annotations

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepResult
from mamlctl.engine.derivatives.interface import Derivatives, Gradient
from mamlctl.engine.evaluation.prediction import (
    expanded,
    mini_batch,
)
from mamlctl.engine.inner_loop import MetaState, Stepper
from mamlctl.engine.nets.batch_norm import NormPass, Params


class _InnerLoop:
    """An inner loop without a graph, and what is measured along it."""

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, stepped: Stepper
    ) -> None:
        self.derivatives, self.state, self.episodes, self.stepped = derivatives, state, episodes, stepped
        self.support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        self.query = derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE)
        self.fast = expanded(state.slow, len(episodes.query_y_TE))
        self.support_losses: list[Tensor] = []
        self.query_losses: dict[int, Tensor] = {}
        self.query_scores: dict[int, Tensor] = {}
        self.passes: list[NormPass] = []

    def step(self, step: int) -> None:
        """One inner step, on the support set or its mini-batch."""
        norm = NormPass(self.state.norm, self.state.running, step)
        batch = mini_batch(self.episodes, step)
        prepared = self.support if batch is None else self.derivatives.prepare(*batch)
        found = self.derivatives.gradient(self.fast, prepared, norm)
        self.passes.append(norm)
        self.support_losses.append(found.loss_T.mean())
        self.fast = self.stepped(self.fast, found.fast, step)

    def look(self, steps: int) -> None:
        """Measure the query set after some steps."""
        outputs_TEN = self.derivatives.logits(self.fast, self.query, self._norm(steps))
        self._note(steps, outputs_TEN)

    def weigh(self, steps: int) -> Gradient:
        """The same, with its gradient."""
        norm = self._norm(steps)
        found = self.derivatives.gradient(self.fast, self.query, norm)
        self.passes.append(norm)
        self._note(steps, found.logits_TEN)
        return found

    def _norm(self, steps: int) -> NormPass:
        return NormPass(self.state.norm, self.state.running, max(steps - 1, 0))

    def _note(self, steps: int, outputs_TEN: Tensor) -> None:
        objective, y_TE = self.derivatives.net.objective, self.episodes.query_y_TE
        self.query_losses[steps] = objective.loss(outputs_TEN, y_TE).mean()
        self.query_scores[steps] = objective.score(outputs_TEN, y_TE).mean()

    def measured(self, grads: dict[str, Tensor], moments: Params) -> MetaStepResult:
        """With the gradients of what is meta-learnt; the meta-loss is that after the last step."""
        losses = self.query_losses, self.query_scores
        last = self.query_losses[max(self.query_losses)]
        return MetaStepResult(grads, last, torch.stack(self.support_losses), *losses, self.passes, moments)
