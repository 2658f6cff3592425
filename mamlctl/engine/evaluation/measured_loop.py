"""The inner loop by first derivatives alone, and what is measured along it.

The algorithms without a graph and every prediction run it; `inner_loop.adapt` is the plain reference.
"""

from __future__ import annotations

from functools import cached_property

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.interface import Derivatives, Gradient, PreparedSet
from mamlctl.engine.inner_loop import DESCENT, InnerRule, Measurements, MetaState, expanded, mini_batch
from mamlctl.engine.nets.batch_norm import NormPass


class InnerLoop:
    """Every task's weights on their way from the initialisation; nothing of earlier steps is kept.

    Its hooks: `update` moves the weights along a gradient, and a caller does between two steps what it wants,
    such as to measure the query set or to keep the gradient that a step returns.
    """

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, rule: InnerRule = DESCENT
    ) -> None:
        self.derivatives, self.state, self.episodes = derivatives, state, episodes
        self.update = rule.stepper(state, len(episodes.support_y_TE))
        self.support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        self.fast = expanded(state.slow, len(episodes.support_y_TE))
        self.measurements = Measurements(derivatives.net.objective)

    @cached_property
    def query(self) -> PreparedSet:
        """The query set, for those that measure it."""
        return self.derivatives.prepare(self.episodes.query_x_TECHW, self.episodes.query_y_TE)

    def support_gradient(self, norm: NormPass, *, keep: bool = False) -> Gradient:
        """At the present weights, of the support set or of the mini-batch that this step sees."""
        batch = mini_batch(self.episodes, norm.step)
        prepared = self.support if batch is None else self.derivatives.prepare(*batch)
        return prepared.gradient(self.fast, norm, keep=keep)

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """Take inner step `step`, counted from 0; returns the gradient, for products if it was kept."""
        norm = self.state.norm_pass(step)
        gradient = self.support_gradient(norm, keep=keep)
        self.measurements.add_support(gradient.loss_T, norm)
        self.fast = self.update(self.fast, gradient.fast, step)
        return gradient

    def run(self, steps: int, *, measure_all: bool = False) -> None:
        """Take so many steps; `measure_all`: the query set too, in front of each."""
        for step in range(steps):
            if measure_all:
                self.record_query_loss(step)
            self.inner_step(step)

    def record_query_loss(self, steps: int) -> None:
        """Measure the query set after `steps` steps, without a gradient."""
        outputs_TEN = self.query.logits(self.fast, self.state.norm_pass(max(steps - 1, 0)))
        self.measurements.add_query(steps, outputs_TEN, self.episodes.query_y_TE)

    def query_gradient(self, steps: int) -> Gradient:
        """The same with its gradient, so that the pass counts among those of training."""
        norm = self.state.norm_pass(max(steps - 1, 0))
        gradient = self.query.gradient(self.fast, norm)
        self.measurements.norm_passes.append(norm)
        self.measurements.add_query(steps, gradient.logits_TEN, self.episodes.query_y_TE, gradient.loss_T)
        return gradient
