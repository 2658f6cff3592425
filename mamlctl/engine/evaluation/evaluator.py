"""How good one or several models are on a fixed list of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import DivergedError, MamlctlError
from mamlctl.data.tasks.episodes import Episodes, Tasks
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.evaluation.prediction import Predict, PredictRequest, adapted
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.batch_norm import Statistics


@dataclass(frozen=True)
class Scores:
    """Each task's score, of the objective's metric, after 0, 1 ... I inner steps."""

    single: list[NDArray[np.float64]]  # one per model, [tasks, inner_steps + 1]
    ensemble: NDArray[np.float64]  # of the averaged class scores or values


@dataclass(frozen=True)
class EvaluationPlan:
    """On how many tasks models are evaluated, and how they adapt and predict."""

    tasks: int  # number 0 .. tasks - 1 of the stream
    inner_steps: int
    statistics: Statistics
    predict: Predict = adapted


class Stopped(Exception):
    """Evaluation was asked to stop before its end."""


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
    """Adapt every model to tasks of the stream, and score its predictions. Nothing stored changes.

    Args:
        derivatives: of the network for the stream's ways.
        states: one model each; the ensemble averages their raw class scores, as the published code does.
        on_progress: called with the number of tasks done, after each chunk of them.
        should_stop: asked in front of each chunk.

    Raises:
        Stopped: when `should_stop` says so.
        DivergedError: a prediction is not finite; the largest of NaNs is not a prediction.
        MamlctlError: a CUDA device has no memory for one task.
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
        except torch.OutOfMemoryError as error:
            if chunk == 1:
                message = f"{stream.device} has no memory for one task"
                raise MamlctlError(message, hint="use fewer ways or queries, or --device cpu") from error
            chunk = (chunk + 1) // 2
            continue
        for scores, outputs_ITEN in zip(single, per_model, strict=True):
            scores.append(_scores_TI(derivatives, outputs_ITEN, episodes))
            if not bool(outputs_ITEN.isfinite().all()):
                raise DivergedError(
                    f"predictions in tasks {first} to {first + len(outputs_ITEN[0]) - 1} are not finite",
                    hint="the model has diverged: start a new run with a lower --meta-lr or --inner-lr",
                )
        ensemble.append(_scores_TI(derivatives, torch.stack(per_model).mean(0), episodes))
        first += len(episodes.query_y_TE)
        on_progress(first)
    joined = [torch.cat(scores).cpu().numpy() for scores in (*single, ensemble)]
    return Scores(joined[:-1], joined[-1])


def _scores_TI(derivatives: Derivatives, outputs_ITEN: torch.Tensor, episodes: Episodes) -> torch.Tensor:
    objective = derivatives.net.objective
    # In float64, so that the mean over many tasks is that of the printed table.
    return torch.stack(
        [objective.score(outputs_TEN.double(), episodes.query_y_TE) for outputs_TEN in outputs_ITEN], dim=1
    )
