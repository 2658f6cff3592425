"""The inner loop with first derivatives only, without an autograd graph through its steps.

Predictions use it, and the algorithms that do not need such a graph: the adjoint, iMAML and Reptile.
`inner_loop.adapt` is the reference that tests compare it with.
"""

from __future__ import annotations

from functools import cached_property

import torch

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.interface import Derivatives, Gradient, PreparedSet
from mamlctl.engine.inner_loop import DESCENT, InnerRule, Measurements, MetaState, expanded, mini_batch
from mamlctl.engine.nets.batch_norm import NormPass


class TaskSets:
    """The sets of some tasks, prepared at their first use and shared by all models that adapt to them."""

    def __init__(self, derivatives: Derivatives, episodes: Episodes) -> None:
        self.derivatives, self.episodes = derivatives, episodes

    @cached_property
    def support(self) -> PreparedSet:
        """The support sets."""
        return self.derivatives.prepare(self.episodes.support_x_TECHW, self.episodes.support_y_TE)

    @cached_property
    def query(self) -> PreparedSet:
        """The query sets."""
        return self.derivatives.prepare(self.episodes.query_x_TECHW, self.episodes.query_y_TE)

    @cached_property
    def query_after_support(self) -> tuple[PreparedSet, int]:
        """The query sets, each preceded by the support set of its task, and the size of a support set.

        Batch norm takes its statistics from the support examples.
        """
        episodes = self.episodes
        both_TECHW = torch.cat([episodes.support_x_TECHW, episodes.query_x_TECHW], dim=1)
        along = episodes.support_y_TE.shape[1]
        return self.derivatives.prepare(both_TECHW, episodes.query_y_TE, along), along


class InnerLoop:
    """The fast weights of all tasks, advanced one inner step at a time; earlier steps are not kept.

    Between two steps a caller may measure the query set, or keep the gradient that `inner_step` returned.
    """

    def __init__(self, sets: TaskSets, state: MetaState, rule: InnerRule = DESCENT) -> None:
        """Start at the slow weights.

        Args:
            sets: the tasks.
            state: slow weights, norm rows and rates.
            rule: the update rule of an inner step.
        """
        self.sets, self.state = sets, state
        self.derivatives, self.episodes = sets.derivatives, sets.episodes
        episodes = sets.episodes
        self.update = rule.stepper(state, len(episodes.support_y_TE))
        self.fast = expanded(state.slow, len(episodes.support_y_TE))
        self.measurements = Measurements(sets.derivatives.net.objective)

    def support_pass(self, step: int) -> NormPass:
        """Set up batch norm of the support set's pass in inner step `step`."""
        return self.state.norm_pass(step, keys_T=self.episodes.support_keys_T)

    def query_pass(self, steps: int) -> NormPass:
        """Set up batch norm of the query set's pass after `steps` inner steps."""
        # The query set after k steps uses the norm row of step k - 1, the step that led to these weights.
        return self.state.norm_pass(max(steps - 1, 0), keys_T=self.episodes.query_keys_T)

    def support_gradient(self, norm: NormPass, *, keep: bool = False) -> Gradient:
        """Compute the gradient of the support loss, on this step's mini-batch if the tasks have them."""
        batch = mini_batch(self.episodes, norm.step)
        prepared = self.sets.support if batch is None else self.derivatives.prepare(*batch)
        return prepared.gradient(self.fast, norm, keep=keep)

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """Take inner step `step`, counted from 0, and return the gradient; `keep` it for products."""
        norm = self.support_pass(step)
        gradient = self.support_gradient(norm, keep=keep)
        self.measurements.add_support(gradient.loss_T, norm)
        self.fast = self.update(self.fast, gradient.fast, step)
        return gradient

    def run(self, steps: int, *, measure_all: bool = False) -> None:
        """Take `steps` inner steps; with `measure_all`, measure the query set before each of them."""
        for step in range(steps):
            if measure_all:
                self.record_query_loss(step)
            self.inner_step(step)

    def record_query_loss(self, steps: int) -> None:
        """Measure the query set after `steps` inner steps; this pass does not update running statistics."""
        outputs_TEN = self.sets.query.logits(self.fast, self.query_pass(steps))
        self.measurements.add_query(steps, outputs_TEN, self.episodes.query_y_TE)

    def query_gradient(self, steps: int) -> Gradient:
        """Measure the query set with its gradient; this is a training pass and updates running statistics."""
        norm = self.query_pass(steps)
        gradient = self.sets.query.gradient(self.fast, norm)
        self.measurements.norm_passes.append(norm)
        known = gradient.loss_T, gradient.score_T
        self.measurements.add_query(steps, gradient.logits_TEN, self.episodes.query_y_TE, *known)
        return gradient
