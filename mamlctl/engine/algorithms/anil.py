"""ANIL: the inner loop adapts the head only.

Raghu, Raghu, Bengio & Vinyals 2020 (arXiv:1909.09157), section 4: MAML in which only the last layer h is
adapted, and the features f of the body with slow weights b stay the same,

    h_{k+1} = h_k - a_k grad_h L_support(h_k; f(x; b))

The meta-gradient of h_0 and a_k is MAML's, unrolled for a linear layer. That of b follows by the chain rule
from dL/df of both sets, so each set passes through the body once forward and once backward, for any number
of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamlctl.core.literals import EngineName
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, unroll
from mamlctl.engine.derivatives.interface import BodyTape
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.inner_loop import RATE, Measurements, MetaState, expanded
from mamlctl.engine.nets.base import HEAD, HeadNet, Net, body_of
from mamlctl.engine.nets.batch_norm import NormPass


def anil(
    net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest, *, engine: EngineName
) -> MetaStepResult:
    """Compute the meta-gradient: unroll the head, then backpropagate through the body.

    Args:
        net, state, episodes, request: as in `meta_gradient.Outer`.
        engine: the --engine setting, which chooses the derivatives of the body.

    Returns:
        As in `meta_gradient.Outer`.
    """
    learnable = state.learnable()
    learnt = {name: learnable[name] for name in learnable if name in HEAD or name.startswith(RATE)}
    frozen = len(learnt) == len(learnable)  # the whole body
    body = BodyFeatures(net, state, episodes, engine, frozen=frozen)
    with torch.enable_grad():
        head = HeadNet(net.outputs, net.objective)
        measurements, meta_loss = unroll(head, state.head_alone(), body.as_episodes(), request)
        features = [] if frozen else body.features
        grads = torch.autograd.grad(meta_loss, [*learnt.values(), *features], materialize_grads=True)
    measurements.norm_passes = body.norm_passes  # the head has no batch norm
    by_body = body.back_through(state, grads[len(learnt) :]) if features else {}
    return MetaStepResult.of(measurements, by_body | dict(zip(learnt, grads, strict=False)), meta_loss)


class BodyFeatures:
    """The features of both sets of each task, and the backward pass from their gradients."""

    def __init__(
        self, net: Net, state: MetaState, episodes: Episodes, engine: EngineName, *, frozen: bool = False
    ) -> None:
        """Compute the features with the slow weights.

        Args:
            net: the network.
            state: the slow weights and norm rows of the body.
            episodes: T tasks.
            engine: how to differentiate the body.
            frozen: keep nothing for the backward pass.
        """
        self.episodes = episodes
        self.features: list[Tensor] = []  # f_TEF of the support set and of the query set
        self.norm_passes: list[NormPass] = []
        self._tapes: list[BodyTape] = []
        derivatives = select_derivatives(net, episodes.support_x_TECHW, engine)
        with torch.no_grad():
            slow = expanded(body_of(state.slow), len(episodes.support_y_TE))
            for x_TECHW, y_TE, keys_T in (
                (episodes.support_x_TECHW, episodes.support_y_TE, episodes.support_keys_T),
                (episodes.query_x_TECHW, episodes.query_y_TE, episodes.query_keys_T),
            ):
                norm = state.norm_pass(0, keys_T=keys_T)
                self.norm_passes.append(norm)
                prepared = derivatives.prepare(x_TECHW, y_TE)
                if frozen:
                    self.features.append(prepared.features(slow, norm))
                    continue
                f_TEF, tape = prepared.features_and_tape(slow, norm)
                self.features.append(f_TEF.requires_grad_())
                self._tapes.append(tape)

    def as_episodes(self) -> Episodes:
        """Return the tasks with features in place of images."""
        support, query = self.features
        return Episodes(support, self.episodes.support_y_TE, query, self.episodes.query_y_TE)

    def gradient(
        self, net: Net, state: MetaState, logits_of: Callable[[Tensor, Tensor], Tensor]
    ) -> MetaStepResult:
        """Compute the gradient of the query loss for classes that are predicted without an inner loop.

        Args:
            net: the network.
            state: the weights and norm rows of the forward pass.
            logits_of: computes logits_TEN of the query set from the features of the support and query set.

        Returns:
            As in `meta_gradient.Outer`; the loss is recorded as the query loss after 0 inner steps.
        """
        measurements = Measurements(net.objective, norm_passes=self.norm_passes)
        with torch.enable_grad():
            logits_TEN = logits_of(*self.features)
            loss = measurements.add_query(0, logits_TEN, self.episodes.query_y_TE).mean()
            by_features = torch.autograd.grad(loss, self.features)
        return MetaStepResult.of(measurements, self.back_through(state, by_features), loss)

    def back_through(self, state: MetaState, by_features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Backpropagate from the features to the body.

        Args:
            state: the weights and norm rows of the forward pass.
            by_features: the gradients of the meta-loss with respect to `features`, one _TEF for each set.

        Returns:
            Gradients with respect to the body's weights and the norm rows, summed over tasks and sets.
        """
        grads = {
            name: torch.zeros_like(weight) for name, weight in (body_of(state.slow) | state.norm).items()
        }
        with torch.no_grad():
            for tape, g_TEF in zip(self._tapes, by_features, strict=True):
                by_body, by_norm = tape.back_through(g_TEF)
                for name, grad in by_body.items():
                    grads[name] += grad.sum(0)
                for name, grad in by_norm.items():
                    grads[name][0] += grad
        return {name: grad.detach() for name, grad in grads.items()}
