"""One task's adapted network, kept with all that predicting needs, so that it adapts once for any queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamlctl.core.literals import Classifier
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.evaluation.measured_loop import InnerLoop
from mamlctl.engine.evaluation.prediction import nearest_distances, prototypes, zero_head
from mamlctl.engine.inner_loop import InnerRule, MetaState
from mamlctl.engine.nets.base import HEAD, body_of
from mamlctl.engine.nets.batch_norm import NormPass, Params, Statistics


class MeasuringPass(NormPass):
    """A pass that keeps the biased variance, which is what it normalises by, in place of the unbiased one."""

    def saw(self, name: str, mean_TC: Tensor, var_TC: Tensor, count: int) -> None:
        self.seen[name] = mean_TC, var_TC


@dataclass(frozen=True)
class AdaptedModel:
    """The network of one task after its last inner step; every tensor has an axis of 1 in front."""

    derivatives: Derivatives
    weights: Params
    norm: Params  # weights and biases of batch norm; empty where they are among the weights
    support: Params  # statistics of the support set under these weights
    fixed: Params  # statistics that predictions are made with; empty: those of the queries themselves
    neighbours: tuple[Tensor, Tensor] | None = None  # support features and labels, in place of a head

    @torch.no_grad()
    def scores(self, x_MCHW: Tensor) -> Tensor:
        """Class scores -> _MN; with fixed statistics those of an image do not depend on the others."""
        statistics = Statistics.RUNNING if self.fixed else Statistics.OWN
        norm = NormPass(self.norm, self.fixed, 0, statistics)
        dummy_labels = torch.zeros(1, len(x_MCHW), dtype=torch.long, device=x_MCHW.device)
        prepared = self.derivatives.prepare(x_MCHW.unsqueeze(0), dummy_labels)
        if self.neighbours is None:
            return prepared.logits(self.weights, norm)[0]
        f_TEF, _ = prepared.features(self.weights, norm)
        return -nearest_distances(f_TEF, *self.neighbours, self.derivatives.net.outputs)[0]


@torch.no_grad()
def adapt_to_support_set(
    derivatives: Derivatives,
    state: MetaState,
    support: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
    classifier: Classifier,
    rule: InnerRule,
) -> AdaptedModel:
    """Adapt a state, whose head has the task's ways, to the support set of one task.

    Predicts what the algorithm's `predict` does after all steps, but for rounding: the statistics of
    Statistics.SUPPORT are measured once and kept.

    Args:
        derivatives: of the network for the task's ways.
        support: one task; its query set is not read.
        statistics: what normalises the queries to come.
    """
    state = state.frozen()
    loop = InnerLoop(derivatives, state, support, rule)
    loop.run(inner_steps)
    weights, prepared = loop.fast, loop.support
    last = max(inner_steps - 1, 0)
    norm, running = _only_row(state.norm, last), _only_row(state.running, last)
    measuring = MeasuringPass(norm, running, 0)
    f_TEF, _ = prepared.features(body_of(weights), measuring)
    measured = {
        f"{name}.{kind}": values
        for name, pair in measuring.seen.items()
        for kind, values in zip(("mean", "var"), pair, strict=True)
    }
    if statistics is Statistics.RUNNING:  # which support features must then share to be compared
        f_TEF, _ = prepared.features(body_of(weights), NormPass(norm, running, 0, statistics))
    neighbours = (f_TEF, support.support_y_TE) if classifier == "neighbours" else None
    if classifier == "prototypes":
        weights = weights | prototype_head(prototypes(f_TEF, support.support_y_TE, derivatives.net.outputs))
    fixed = {Statistics.RUNNING: running, Statistics.SUPPORT: measured, Statistics.OWN: Params()}[statistics]
    return AdaptedModel(derivatives, weights, norm, measured, fixed, neighbours)


def _only_row(rows: Mapping[str, Tensor], step: int) -> Params:
    """The row of a step, kept as the only one; a step beyond the last row reuses it."""
    return {name: rows_RC[min(step, len(rows_RC) - 1)].unsqueeze(0) for name, rows_RC in rows.items()}


def prototype_head(prototypes_TNF: Tensor) -> Params:
    """Squared distances as a linear layer: -|f - c|^2 = 2 c f - |c|^2, but for a term that classes share."""
    values = 2 * prototypes_TNF, -prototypes_TNF.square().sum(-1)
    return dict(zip(HEAD, values, strict=True))


def resize_head(state: MetaState, ways: int, classifier: Classifier) -> MetaState:
    """The state with a head for so many classes.

    Rows of a learnt head, with their rates, are taken in turn: as many as it takes, and from the first again
    beyond the last.
    """
    if classifier in ("prototypes", "neighbours"):
        return replace(state, slow=body_of(state.slow), rates={}, moments={})
    if classifier == "zeros":
        return replace(state, slow=state.slow | zero_head(state.slow, ways))
    # Measured against a head of zeros (the same as one of mean rows: what classes share leaves no trace in
    # softmax or gradients) and random mixtures of rows (mostly worse). Accuracy of 5-way 1-shot runs on other
    # ways, rows in turn / zeros: 300 meta-steps, 32 filters, one seed, --bn support, 3 queries a class, 160
    # test tasks (80 of 10 ways, 40 of 20), each ± 0.4 to 4.2:
    #                     2-way 1-shot 3-way 1-shot 10-way 1-shot 20-way 1-shot 3-way 5-shot 10-way 5-shot
    # omniglot maml++      94.3 / 93.6  92.7 / 90.1   68.3 / 57.1   32.7 / 22.6  97.9 / 95.3   80.8 / 62.0
    # omniglot meta-sgd    90.0 / 93.1  90.2 / 88.0   73.5 / 73.3   50.1 / 39.7  98.2 / 85.5   89.8 / 79.9
    # omniglot maml        91.6 / 94.6  90.4 / 92.1   70.2 / 63.2   43.4 / 33.4  96.9 / 96.3   85.9 / 68.5
    # glyphs   maml++      94.5 / 90.3  91.5 / 72.4   69.2 / 62.8   45.4 / 45.2  98.6 / 69.1   81.7 / 70.5
    # glyphs   meta-sgd    92.4 / 94.7  92.2 / 91.6   80.8 / 80.3   57.0 / 46.1  99.4 / 90.7   95.0 / 86.9
    # glyphs   maml        91.8 / 97.7  90.8 / 93.3   78.2 / 70.5   50.6 / 43.7  99.3 / 95.1   93.9 / 79.6
    bias = state.slow["linear.bias"]
    row_N = torch.arange(ways, device=bias.device) % len(bias)
    rates = {
        name: rate[:, row_N] if name in HEAD and rate.dim() > 1 else rate
        for name, rate in state.rates.items()
    }
    slow, moments = (
        {name: tensor[row_N] if name in HEAD else tensor for name, tensor in part.items()}
        for part in (state.slow, state.moments)
    )
    return replace(state, slow=slow, rates=rates, moments=moments)


def plain_weights(model: AdaptedModel) -> Params:
    """What torch's own layers of the same names load: batch norm with fixed statistics, all in float32.

    The statistics are those that predictions are made with, or else the support set's.
    """
    statistics = {
        name.replace(".mean", ".running_mean").replace(".var", ".running_var"): values
        for name, values in (model.fixed or model.support).items()
    }
    whole = model.weights | model.norm | statistics
    return {name: values[0].float().cpu().clone() for name, values in whole.items()}
