"""Evaluate one or several models on a fixed list of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import DivergedError, MamlctlError, is_out_of_memory
from mamlctl.data.tasks.episodes import Episodes, Tasks
from mamlctl.data.tasks.table_tasks import TableStream, table_stream
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import Predict, PredictRequest, adapted
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.batch_norm import Statistics


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model or one ensemble.

    From a table, tasks are drawn more than once: a score is then the mean over the draws of a task, in the
    unit of the table if there is one target.
    """

    last_T: NDArray[np.float64]  # of each task, after the last inner step
    curve_TI: NDArray[np.float64]  # of the first tasks, after 0, 1, ..., I inner steps; may have no tasks
    # From a table: the squared error of each target after the last inner step, in its own unit.
    targets_TN: NDArray[np.float64] | None = None
    # With a loss that is not the default: that of each task, like `last_T` but without a unit.
    loss_T: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of all models, and of the ensemble of them."""

    single: list[ModelScores]  # one for each model
    ensemble: ModelScores  # scores of the models' averaged class scores or values


@dataclass(frozen=True)
class EvaluationPlan:
    """How many tasks models are evaluated on, and how they adapt and predict."""

    tasks: int  # tasks 0 to tasks - 1 of the stream
    inner_steps: int
    statistics: Statistics
    predict: Predict = adapted
    curve_tasks: int = 0  # of the first tasks, scores after every inner step are needed too


class Stopped(Exception):
    """`should_stop` returned True before all tasks were evaluated."""


@torch.no_grad()
def evaluate(
    derivatives: Derivatives,
    states: Sequence[MetaState],
    stream: Tasks,
    plan: EvaluationPlan,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Adapt every model to the tasks of a stream and score its predictions. No state changes.

    Args:
        derivatives: of the network for the stream's ways.
        states: one for each model; the ensemble averages their class scores before the softmax, as the
            published MAML++ code does.
        stream: the tasks.
        plan: number of tasks, inner steps, batch-norm statistics and predictor.
        on_progress: called with the number of finished tasks after each chunk of tasks.
        should_stop: called before each chunk.

    Returns:
        The scores of each model and of the ensemble.

    Raises:
        Stopped: `should_stop` returned True.
        DivergedError: a prediction is not finite.
        MamlctlError: the memory is too small for one task.
    """
    states = [state.frozen() for state in states]
    parts: list[list[torch.Tensor]] = [[] for _ in (*states, "ensemble")]
    errors: list[list[torch.Tensor]] = [[] for _ in parts]  # of the targets of a table
    losses: list[list[torch.Tensor]] = [[] for _ in parts]  # if the loss is not the default
    table = table_stream(stream)
    along = stream.shots if plan.statistics is Statistics.SUPPORT else 0
    examples = stream.ways * max(stream.shots, stream.queries + along)
    chunk = min(plan.tasks, tasks_per_pass(derivatives.net, examples, stream.device))
    first = 0
    all_finite: list[tuple[int, torch.Tensor]] = []  # the first task of each chunk, and the result
    while first < plan.tasks:
        if should_stop():
            raise Stopped
        per_step = first < plan.curve_tasks
        end = min(plan.curve_tasks, plan.tasks) if per_step else plan.tasks
        episodes = stream.episodes(first, min(chunk, end - first))
        sets = TaskSets(derivatives, episodes)
        try:
            per_model = [
                plan.predict(PredictRequest(sets, state, plan.inner_steps, plan.statistics, per_step))
                for state in states
            ]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if chunk == 1:
                message = f"{stream.device} does not have enough memory for one task of {examples} examples"
                elsewhere = "" if stream.device.type == "cpu" else ", or --device cpu"
                raise MamlctlError(message, hint=f"use fewer ways or queries{elsewhere}") from error
            chunk = (chunk + 1) // 2
            continue
        # argmax returns a class for NaNs too, so an accuracy would not show them.
        all_finite.append((first, torch.stack([outputs.isfinite().all() for outputs in per_model]).all()))
        # Reading the result waits for a CUDA device, so that is done once, at the end.
        if stream.device.type == "cpu" or first + len(episodes.query_y_TE) >= plan.tasks:
            _check(all_finite, first + len(episodes.query_y_TE))
            all_finite.clear()
        outputs = (*per_model, torch.stack(per_model).mean(0))
        for scores, of_targets, loss_T, outputs_ITEN in zip(parts, errors, losses, outputs, strict=True):
            scores.append(_scores_TI(derivatives, outputs_ITEN, episodes))
            loss_T += _own_loss_T(derivatives, outputs_ITEN, episodes)
            if table is not None:
                of_targets.append((outputs_ITEN[-1].double() - episodes.query_y_TE).square().mean(1))
        first += len(episodes.query_y_TE)
        on_progress(first)
    joined = [_joined(*of_model, plan.curve_tasks) for of_model in zip(parts, losses, strict=True)]
    if table is not None:
        pairs = zip(joined, errors, strict=True)
        joined = [_by_task(table, scores, torch.cat(part).cpu().numpy()) for scores, part in pairs]
    *single, ensemble = joined
    return Scores(single, ensemble)


def _by_task(table: TableStream, scores: ModelScores, errors_TN: NDArray[np.float64]) -> ModelScores:
    """The scores of each task of a table, averaged over its draws, in the units of the table."""

    def mean_of_draws(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, place_T, draws = np.unique(table.tasks_of(0, len(values)), return_inverse=True, return_counts=True)
        columns = [np.bincount(place_T, column) / draws for column in values.reshape(len(values), -1).T]
        return np.stack(columns, axis=1).reshape(len(draws), *values.shape[1:])

    unit = table.standardisation.score_unit
    curve_TI = scores.curve_TI
    return ModelScores(
        mean_of_draws(scores.last_T) * unit,
        mean_of_draws(curve_TI) * unit if len(curve_TI) else curve_TI,
        mean_of_draws(errors_TN) * table.standardisation.variances,
        None if scores.loss_T is None else mean_of_draws(scores.loss_T),
    )


def _check(all_finite: Sequence[tuple[int, torch.Tensor]], end: int) -> None:
    """Raise DivergedError for the first chunk of tasks up to `end` whose predictions are not finite."""
    ends = [*(first for first, _ in all_finite[1:]), end]
    for (first, finite), after in zip(all_finite, ends, strict=True):
        if not bool(finite):
            raise DivergedError(
                f"predictions in tasks {first} to {after - 1} are not finite",
                hint="start a new run with a lower --meta-lr or --inner-lr",
            )


def _joined(parts: Sequence[torch.Tensor], losses: Sequence[torch.Tensor], curve_tasks: int) -> ModelScores:
    """Join the scores of chunks of tasks; those of the first `curve_tasks` tasks have all inner steps."""
    last_T = torch.cat([scores_TI[:, -1] for scores_TI in parts]).cpu().numpy()
    curve, done = [], 0
    for scores_TI in parts:
        if done < curve_tasks:
            curve.append(scores_TI)
        done += len(scores_TI)
    curve_TI = torch.cat(curve).cpu().numpy() if curve else np.empty((0, 0))
    loss_T = torch.cat([*losses]).cpu().numpy() if losses else None
    return ModelScores(last_T, curve_TI, loss_T=loss_T)


def _scores_TI(derivatives: Derivatives, outputs_ITEN: torch.Tensor, episodes: Episodes) -> torch.Tensor:
    objective = derivatives.net.objective
    # In float64, so that the mean over many tasks has no rounding error in the digits that are printed.
    return torch.stack(
        [objective.score(outputs_TEN.double(), episodes.query_y_TE) for outputs_TEN in outputs_ITEN], dim=1
    )


def _own_loss_T(
    derivatives: Derivatives, outputs_ITEN: torch.Tensor, episodes: Episodes
) -> list[torch.Tensor]:
    """The loss of each task after the last inner step, in float64; nothing for the default loss."""
    objective = derivatives.net.objective
    if objective.has_default_loss:
        return []
    return [objective.loss(outputs_ITEN[-1].double(), episodes.query_y_TE)]
