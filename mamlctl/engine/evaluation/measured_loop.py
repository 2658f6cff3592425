"""The inner loop with first derivatives only, without an autograd graph through its steps.

Predictions use it, and the algorithms that do not need such a graph: the adjoint, iMAML and Reptile.
`inner_loop.adapt` is the reference that tests compare it with.
"""

from __future__ import annotations

from functools import cached_property

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.interface import Derivatives, Gradient, PreparedSet
from mamlctl.engine.inner_loop import DESCENT, InnerRule, Measurements, MetaState, expanded, mini_batch
from mamlctl.engine.nets.batch_norm import NormPass


class InnerLoop:
    """The fast weights of all tasks, advanced one inner step at a time; earlier steps are not kept.

    Between two steps a caller may measure the query set, or keep the gradient that `inner_step` returned.
    """

    def __init__(
        self, derivatives: Derivatives, state: MetaState, episodes: Episodes, rule: InnerRule = DESCENT
    ) -> None:
        """Start at the slow weights.

        Args:
            derivatives: of the network.
            state: slow weights, norm rows and rates.
            episodes: the tasks.
            rule: the update rule of an inner step.
        """
        self.derivatives, self.state, self.episodes = derivatives, state, episodes
        self.update = rule.stepper(state, len(episodes.support_y_TE))
        self.support = derivatives.prepare(episodes.support_x_TECHW, episodes.support_y_TE)
        self.fast = expanded(state.slow, len(episodes.support_y_TE))
        self.measurements = Measurements(derivatives.net.objective)

    @cached_property
    def query(self) -> PreparedSet:
        """The query set; prepared at the first use, because some callers never need it."""
        return self.derivatives.prepare(self.episodes.query_x_TECHW, self.episodes.query_y_TE)

    def support_gradient(self, norm: NormPass, *, keep: bool = False) -> Gradient:
        """Compute the gradient of the support loss, on this step's mini-batch if the tasks have them."""
        batch = mini_batch(self.episodes, norm.step)
        prepared = self.support if batch is None else self.derivatives.prepare(*batch)
        return prepared.gradient(self.fast, norm, keep=keep)

    def inner_step(self, step: int, *, keep: bool = False) -> Gradient:
        """Take inner step `step`, counted from 0, and return the gradient; `keep` it for products."""
        norm = self.state.norm_pass(step)
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
        # The query set after k steps uses the norm row of step k - 1, the step that led to these weights.
        outputs_TEN = self.query.logits(self.fast, self.state.norm_pass(max(steps - 1, 0)))
        self.measurements.add_query(steps, outputs_TEN, self.episodes.query_y_TE)

    def query_gradient(self, steps: int) -> Gradient:
        """Measure the query set with its gradient; this is a training pass and updates running statistics."""
        norm = self.state.norm_pass(max(steps - 1, 0))
        gradient = self.query.gradient(self.fast, norm)
        self.measurements.norm_passes.append(norm)
        self.measurements.add_query(steps, gradient.logits_TEN, self.episodes.query_y_TE, gradient.loss_T)
        return gradient
