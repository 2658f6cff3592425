"""Accuracy of one or several models on a fixed list of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.data.episodes import Episodes, TaskStream
from mamlctl.engine.derivatives import Derivatives
from mamlctl.engine.fast import tasks_per_pass
from mamlctl.engine.inner import MetaState
from mamlctl.engine.norms import NormPass, Statistics
from mamlctl.errors import DivergedError, MamlctlError


@dataclass(frozen=True)
class Scores:
    """Share of right query predictions of each task after 0, 1 ... I inner steps."""

    single: list[NDArray[np.float64]]  # one per model, [tasks, inner_steps + 1]
    ensemble: NDArray[np.float64]  # of the averaged class scores


class Stopped(Exception):
    """Evaluation was asked to stop before its end."""


@torch.no_grad()
def evaluate(
    derivatives: Derivatives,
    states: Sequence[MetaState],
    stream: TaskStream,
    *,
    tasks: int,
    inner_steps: int,
    statistics: Statistics,
    on_progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Adapt every model to tasks 0 .. tasks-1 of the stream and judge it on their query sets.

    The ensemble averages raw class scores over models, as the published code does. Nothing stored changes.
    Raises Stopped when `should_stop` says so between two chunks, DivergedError when a class score is not
    finite: the largest of NaNs is no prediction, MamlctlError when a CUDA device has no memory for a task.
    """
    states = [state.frozen() for state in states]
    single: list[list[torch.Tensor]] = [[] for _ in states]
    ensemble: list[torch.Tensor] = []
    along = stream.shots if statistics is Statistics.SUPPORT else 0
    examples = stream.ways * max(stream.shots, stream.queries + along)
    chunk = min(tasks, tasks_per_pass(derivatives.net, examples, stream.device))
    first = 0
    while first < tasks:
        if should_stop():
            raise Stopped
        episodes = stream.episodes(first, min(chunk, tasks - first))
        try:
            per_model = [
                adapted_logits(derivatives, state, episodes, inner_steps=inner_steps, statistics=statistics)
                for state in states
            ]
        except torch.OutOfMemoryError as error:
            if chunk == 1:
                message = f"{stream.device} has no memory for one task"
                raise MamlctlError(message, hint="use fewer ways or queries, or --device cpu") from error
            chunk = (chunk + 1) // 2
            continue
        for scores, logits_ITEN in zip(single, per_model, strict=True):
            scores.append(_right_TI(logits_ITEN, episodes))
            if not bool(logits_ITEN.isfinite().all()):
                raise DivergedError(
                    f"class scores in tasks {first} to {first + len(logits_ITEN[0]) - 1} are not finite",
                    hint="the model has diverged: start a new run with a lower --meta-lr or --inner-lr",
                )
        ensemble.append(_right_TI(torch.stack(per_model).mean(0), episodes))
        first += len(episodes.query_y_TE)
        on_progress(first)
    joined = [torch.cat(scores).cpu().numpy() for scores in (*single, ensemble)]
    return Scores(joined[:-1], joined[-1])


def adapted_logits(
    derivatives: Derivatives,
    state: MetaState,
    episodes: Episodes,
    *,
    inner_steps: int,
    statistics: Statistics,
) -> torch.Tensor:
    """Class scores of the query sets after 0, 1 ... inner_steps steps -> logits_ITEN, that many and one.

    With Statistics.SUPPORT the support set goes along with the queries, so that every layer's statistics are
    those of the same weights.
    """
    support_x_TECHW, query_x_TECHW = episodes.support_x_TECHW, episodes.query_x_TECHW
    support = derivatives.prepare(support_x_TECHW, episodes.support_y_TE)
    along = support_x_TECHW.shape[1] if statistics is Statistics.SUPPORT else 0
    if along:
        query_x_TECHW = torch.cat([support_x_TECHW, query_x_TECHW], dim=1)
    query = derivatives.prepare(query_x_TECHW, episodes.query_y_TE, along or None)
    tasks = len(support_x_TECHW)
    fast = {name: weight.expand(tasks, *weight.shape) for name, weight in state.slow.items()}
    logits = []
    for step in range(inner_steps + 1):
        norm = NormPass(state.norm, state.running, max(step - 1, 0), statistics, along)
        logits.append(derivatives.logits(fast, query, norm)[:, along:])
        if step < inner_steps:
            norm = NormPass(state.norm, state.running, step)
            fast = state.stepped(fast, derivatives.gradient(fast, support, norm).fast, step)
    return torch.stack(logits)


def _right_TI(logits_ITEN: torch.Tensor, episodes: Episodes) -> torch.Tensor:
    right_ITE = logits_ITEN.argmax(-1).eq(episodes.query_y_TE)
    return right_ITE.double().mean(-1).T
