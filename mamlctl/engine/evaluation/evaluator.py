"""Evaluate one or several models on a fixed list of tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import DivergedError, MamlctlError, is_out_of_memory
from mamlctl.data.tasks.episodes import Episodes, Tasks
from mamlctl.data.tasks.table_tasks import TableStream, table_stream
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.distributed import ALONE, Ranks
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
    ranks: Ranks = ALONE,
) -> Scores:
    """Adapt every model to the tasks of a stream and score its predictions. No state changes.

    Args:
        derivatives: of the network for the stream's ways.
        states: one for each model; the ensemble averages their class scores before the softmax, as the
            published MAML++ code does.
        stream: the tasks.
        plan: number of tasks, inner steps, batch-norm statistics and predictor.
        on_progress: called with the number of finished tasks after each chunk of tasks.
        should_stop: called before each chunk; with several ranks, before each round of chunks.
        ranks: the processes that share the tasks.

    Returns:
        The scores of each model and of the ensemble.

    Raises:
        Stopped: `should_stop` returned True.
        DivergedError: a prediction is not finite.
        MamlctlError: the memory is too small for one task.
    """
    states = [state.frozen() for state in states]
    along = stream.shots if plan.statistics is Statistics.SUPPORT else 0
    examples = stream.ways * max(stream.shots, stream.queries + along)
    chunk = tasks_per_pass(derivatives.net, examples, stream.device)
    work = _Work(derivatives, states, stream, plan, examples)
    if ranks.count == 1:
        scores = work.scores(range(plan.tasks), min(plan.tasks, chunk), on_progress, should_stop)
    else:
        scores = _shared(work, min(chunk, -(-plan.tasks // ranks.count)), ranks, on_progress, should_stop)
    if (table := table_stream(stream)) is not None:
        scores = [_by_task(table, part) for part in scores]
    *single, ensemble = scores
    return Scores(single, ensemble)


@dataclass(frozen=True)
class _Work:
    """Models and the tasks to score them on."""

    derivatives: Derivatives
    states: Sequence[MetaState]  # frozen
    stream: Tasks
    plan: EvaluationPlan
    examples: int  # per task, in the larger pass

    def scores(
        self,
        tasks: range,
        chunk: int,
        on_progress: Callable[[int], None] = lambda done: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[ModelScores]:
        """The scores of each model and of the ensemble on some tasks; from a table, those of each draw.

        Args:
            tasks: their numbers.
            chunk: tasks per pass; fewer if the memory is too small.
            on_progress, should_stop: as in `evaluate`.

        Raises:
            Stopped, DivergedError, MamlctlError: as `evaluate` does.
        """
        plan, stream, derivatives = self.plan, self.stream, self.derivatives
        curve_end = min(max(plan.curve_tasks, tasks.start), tasks.stop)
        parts: list[list[torch.Tensor]] = [[] for _ in (*self.states, "ensemble")]
        errors: list[list[torch.Tensor]] = [[] for _ in parts]  # of the targets of a table
        losses: list[list[torch.Tensor]] = [[] for _ in parts]  # if the loss is not the default
        table = table_stream(stream)
        first = tasks.start
        all_finite: list[tuple[int, torch.Tensor]] = []  # the first task of each chunk, and the result
        while first < tasks.stop:
            if should_stop():
                raise Stopped
            per_step = first < curve_end
            end = curve_end if per_step else tasks.stop
            episodes = stream.episodes(first, min(chunk, end - first))
            sets = TaskSets(derivatives, episodes)
            try:
                per_model = [
                    plan.predict(PredictRequest(sets, state, plan.inner_steps, plan.statistics, per_step))
                    for state in self.states
                ]
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if chunk == 1:
                    device, examples = stream.device, self.examples
                    message = f"{device} does not have enough memory for one task of {examples} examples"
                    elsewhere = "" if device.type == "cpu" else ", or --device cpu"
                    raise MamlctlError(message, hint=f"use fewer ways or queries{elsewhere}") from error
                chunk = (chunk + 1) // 2
                continue
            # argmax returns a class for NaNs too, so an accuracy would not show them.
            finite = torch.stack([outputs.isfinite().all() for outputs in per_model]).all()
            all_finite.append((first, finite))
            # Reading the result waits for a CUDA device, so that is done once, at the end.
            if stream.device.type == "cpu" or first + len(episodes.query_y_TE) >= tasks.stop:
                _check(all_finite, first + len(episodes.query_y_TE), derivatives)
                all_finite.clear()
            outputs = (*per_model, torch.stack(per_model).mean(0))
            for scores, of_targets, loss_T, outputs_ITEN in zip(parts, errors, losses, outputs, strict=True):
                scores.append(_scores_TI(derivatives, outputs_ITEN, episodes))
                loss_T += _own_loss_T(derivatives, outputs_ITEN, episodes)
                if table is not None:
                    of_targets.append((outputs_ITEN[-1].double() - episodes.query_y_TE).square().mean(1))
            first += len(episodes.query_y_TE)
            on_progress(first)
        curve_tasks = curve_end - tasks.start
        joined = [_joined(*of_model, curve_tasks) for of_model in zip(parts, losses, strict=True)]
        if table is not None:
            pairs = zip(joined, errors, strict=True)
            joined = [replace(part, targets_TN=torch.cat(of).cpu().numpy()) for part, of in pairs]
        return joined


def _shared(
    work: _Work,
    chunk: int,
    ranks: Ranks,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> list[ModelScores]:
    """Do the same as `_Work.scores` for all tasks, in rounds of one chunk per rank; all ranks get the result.

    The chunks are those of a single process with as many tasks per pass, so the scores are equal to the bit.

    Args:
        work: the models and the tasks.
        chunk: tasks per pass.
        ranks: the processes.
        on_progress, should_stop: as in `evaluate`.
    """
    plan = work.plan
    bounds = (0, min(plan.curve_tasks, plan.tasks), plan.tasks)
    chunks = [
        range(first, min(first + chunk, end))
        for start, end in itertools.pairwise(bounds)
        for first in range(start, end, chunk)
    ]
    own: list[tuple[range, list[ModelScores]]] = []
    for number in range(0, len(chunks), ranks.count):
        if should_stop():
            raise Stopped
        together = chunks[number : number + ranks.count]
        failed = torch.zeros(ranks.count)
        for tasks in together[ranks.rank : ranks.rank + 1]:
            try:
                own.append((tasks, work.scores(tasks, chunk)))
            except DivergedError:
                failed[ranks.rank] = 1
        if bool(ranks.total(failed).any()):
            raise _not_finite(together[int(failed.argmax())], work.derivatives)
        on_progress(together[-1].stop)
    return _gathered(own, len(work.states) + 1, plan, ranks)


def _gathered(
    own: Sequence[tuple[range, list[ModelScores]]], models: int, plan: EvaluationPlan, ranks: Ranks
) -> list[ModelScores]:
    """Put the scores of all ranks together.

    Args:
        own: the chunks of this rank, with the scores of each model and of the ensemble.
        models: how many that are.
        plan: the plan of the evaluation.
        ranks: the processes.
    """
    # A rank without a chunk does not know how many scores a task has.
    sizes = torch.zeros(ranks.count, 3)
    for _, (part, *_rest) in own:
        targets = 0 if part.targets_TN is None else part.targets_TN.shape[1]
        found = torch.tensor([part.curve_TI.shape[1], targets, part.loss_T is not None])
        sizes[ranks.rank] = sizes[ranks.rank].maximum(found)
    steps, targets, has_loss = (int(size) for size in ranks.total(sizes).amax(0))
    shapes = {"last_T": (plan.tasks,), "curve_TI": (min(plan.curve_tasks, plan.tasks), steps)}
    shapes |= {"targets_TN": (plan.tasks, targets)} if targets else {}
    shapes |= {"loss_T": (plan.tasks,)} if has_loss else {}
    whole = {name: torch.zeros(models, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    for tasks, scores in own:
        for name, tensor in whole.items():
            for model, part in enumerate(scores):
                if len(values := getattr(part, name)):  # the curve has only the first tasks
                    tensor[model, tasks.start : tasks.stop] = torch.from_numpy(values)
    for tensor in whole.values():
        ranks.total(tensor)  # every number but one of each sum is 0
    return [
        ModelScores(**{name: tensor[model].numpy() for name, tensor in whole.items()})
        for model in range(models)
    ]


def _by_task(table: TableStream, scores: ModelScores) -> ModelScores:
    """The scores of each task of a table, averaged over its draws, in the units of the table."""

    def mean_of_draws(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, place_T, draws = np.unique(table.tasks_of(0, len(values)), return_inverse=True, return_counts=True)
        columns = [np.bincount(place_T, column) / draws for column in values.reshape(len(values), -1).T]
        return np.stack(columns, axis=1).reshape(len(draws), *values.shape[1:])

    assert scores.targets_TN is not None
    unit = table.standardisation.score_unit
    curve_TI = scores.curve_TI
    return ModelScores(
        mean_of_draws(scores.last_T) * unit,
        mean_of_draws(curve_TI) * unit if len(curve_TI) else curve_TI,
        mean_of_draws(scores.targets_TN) * table.standardisation.variances,
        None if scores.loss_T is None else mean_of_draws(scores.loss_T),
    )


def _check(all_finite: Sequence[tuple[int, torch.Tensor]], end: int, derivatives: Derivatives) -> None:
    """Raise DivergedError for the first chunk of tasks whose predictions or returns are not finite.

    Args:
        all_finite: the first task of each chunk, and whether its numbers are finite.
        end: the end of the last chunk.
        derivatives: of the network.
    """
    ends = [*(first for first, _ in all_finite[1:]), end]
    for (first, finite), after in zip(all_finite, ends, strict=True):
        if not bool(finite):
            raise _not_finite(range(first, after), derivatives)


def _not_finite(tasks: range, derivatives: Derivatives) -> DivergedError:
    what, lower = "predictions", "--meta-lr or --inner-lr"
    if derivatives.net.objective.metric == "return":
        what, lower = "returns", "--inner-lr, --meta-lr or --max-kl"
    return DivergedError(
        f"{what} in tasks {tasks.start} to {tasks.stop - 1} are not finite",
        hint=f"start a new run with a lower {lower}",
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
