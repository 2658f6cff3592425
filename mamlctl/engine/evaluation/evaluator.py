"""Evaluate one or several models on a fixed list of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import DivergedError, MamlctlError, is_out_of_memory
from mamlctl.data.tasks.episodes import Episodes, Tasks
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.evaluation.prediction import Predict, PredictRequest, adapted
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.batch_norm import Statistics


@dataclass(frozen=True)
class Scores:
    """The score of each task after 0, 1, ..., I inner steps: arrays [tasks, I + 1]."""

    single: list[NDArray[np.float64]]  # one array for each model
    ensemble: NDArray[np.float64]  # scores of the models' averaged class scores or values


@dataclass(frozen=True)
class EvaluationPlan:
    """How many tasks models are evaluated on, and how they adapt and predict."""

    tasks: int  # tasks 0 to tasks - 1 of the stream
    inner_steps: int
    statistics: Statistics
    predict: Predict = adapted


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
    single: list[list[torch.Tensor]] = [[] for _ in states]
    ensemble: list[torch.Tensor] = []
    along = stream.shots if plan.statistics is Statistics.SUPPORT else 0
    examples = stream.ways * max(stream.shots, stream.queries + along)
    chunk = min(plan.tasks, tasks_per_pass(derivatives.net, examples, stream.device))
    first = 0
    while first < plan.tasks:
        if should_stop():
            raise Stopped
        episodes = stream.episodes(first, min(chunk, plan.tasks - first))
        try:
            per_model = [
                plan.predict(PredictRequest(derivatives, state, episodes, plan.inner_steps, plan.statistics))
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
        for scores, outputs_ITEN in zip(single, per_model, strict=True):
            scores.append(_scores_TI(derivatives, outputs_ITEN, episodes))
            # argmax returns a class for NaNs too, so an accuracy would not show them.
            if not bool(outputs_ITEN.isfinite().all()):
                raise DivergedError(
                    f"predictions in tasks {first} to {first + len(outputs_ITEN[0]) - 1} are not finite",
                    hint="start a new run with a lower --meta-lr or --inner-lr",
                )
        ensemble.append(_scores_TI(derivatives, torch.stack(per_model).mean(0), episodes))
        first += len(episodes.query_y_TE)
        on_progress(first)
    joined = [torch.cat(scores).cpu().numpy() for scores in (*single, ensemble)]
    return Scores(joined[:-1], joined[-1])


def _scores_TI(derivatives: Derivatives, outputs_ITEN: torch.Tensor, episodes: Episodes) -> torch.Tensor:
    objective = derivatives.net.objective
    # In float64, so that the mean over many tasks has no rounding error in the digits that are printed.
    return torch.stack(
        [objective.score(outputs_TEN.double(), episodes.query_y_TE) for outputs_TEN in outputs_ITEN], dim=1
    )
