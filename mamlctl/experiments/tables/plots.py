"""Figures of runs on a table or own tasks: curves of one input, or predicted against true values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.streams import TaskSource
from mamlctl.data.tasks.table_tasks import Standardisation, different_tasks, table_stream
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.experiments.trained_model import TrainedModel
from mamlctl.report.figures import fit_figures
from mamlctl.report.figures.fit_figures import Agreement, Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamlctl.data.reading.table_files import Floats

Outputs = Callable[[Episodes], torch.Tensor]  # a task -> outputs_ITEN of its queries

TASKS = 3  # with curves
POINTS = 200  # of a curve
MOST_TASKS = 50  # whose queries are points of one panel
TARGETS = 3  # the first ones of more
MARGIN = 0.05  # of a curve's range on both sides


def table_figure(models: Sequence[TrainedModel], title: str) -> Figure:
    """Draw the first test tasks of a table, or of the user's own ones, as several runs predict them.

    Args:
        models: runs on the same tasks; the tasks and the columns are those of the first one.
        title: of the figure.
    """
    columns = _columns(models[0].source)
    targets = columns.targets[:TARGETS]
    if len(columns.inputs) > 1:
        rows = [_agreements(model, columns) for model in models]
        return fit_figures.agreements(rows, targets, title)
    shown = different_tasks(models[0].stream, TASKS)
    rows_of_fits = [[fit for model in models for fit in _fits(model, columns, task)] for task in range(shown)]
    return fit_figures.fits(rows_of_fits, (columns.inputs[0], targets * len(models)), title)


def _columns(source: TaskSource) -> Standardisation:
    """The columns of a table; values that are not standardised for the user's own tasks."""
    if source.table is not None:
        return source.table.standardisation
    sizes = {"x": math.prod(source.example_shape), "y": source.targets}
    x, y = (
        tuple(f"{name}{number}" for number in range(1, size + 1)) if size > 1 else (name,)
        for name, size in sizes.items()
    )
    return Standardisation(x, y, (0.0,) * len(x + y), (1.0,) * len(x + y))


def _agreements(model: TrainedModel, columns: Standardisation) -> list[Agreement]:
    """One panel per target, with one draw from each task."""
    episodes = model.stream.episodes(0, different_tasks(model.stream, MOST_TASKS))
    outputs_ITEN = model.outputs(episodes, model.inner_steps)
    truth_MN = in_units(columns, episodes.query_y_TE)
    before_MN, after_MN = (in_units(columns, outputs_ITEN[step]) for step in (0, -1))
    mse_N = np.square(after_MN - truth_MN).mean(0)
    return [
        Agreement(model.config.algo, truth_MN[:, n], before_MN[:, n], after_MN[:, n], float(mse_N[n]))
        for n in range(min(TARGETS, len(columns.targets)))
    ]


def _fits(model: TrainedModel, columns: Standardisation, task: int) -> list[Fit]:
    """One panel per target of a task."""
    table = table_stream(model.stream)
    name = f"task {task}" if table is None else table.names[int(table.tasks_of(task, 1)[0])]
    start = algorithm_of(model.config).start_of(model.config)
    episodes = model.stream.episodes(task, 1)
    return fits_of(lambda sets: model.outputs(sets, model.inner_steps), episodes, columns, f"{name}: {start}")


def fits_of(outputs_of: Outputs, episodes: Episodes, columns: Standardisation, title: str) -> list[Fit]:
    """A panel for each target of one task with a single input.

    Args:
        outputs_of: predicts the query set after 0, 1, ..., I inner steps.
        episodes: the task, standardised; targets that are NaN are unknown.
        columns: the columns of the run.
        title: of the panels.
    """
    support_x, query_x = (
        columns.inputs_of(x.double().cpu().numpy()[0])[:, 0]
        for x in (episodes.support_x_TECHW, episodes.query_x_TECHW)
    )
    support_MN, query_MN = (in_units(columns, y) for y in (episodes.support_y_TE, episodes.query_y_TE))
    both = np.concatenate([support_x, query_x])
    edge = MARGIN * float(np.ptp(both))
    x = np.linspace(both.min() - edge, both.max() + edge, POINTS)
    grid = torch.from_numpy(columns.apply(x[:, None])).to(episodes.query_x_TECHW)
    x_TED = torch.cat([episodes.query_x_TECHW, grid.unsqueeze(0)], dim=1)
    y_TEN = x_TED.new_zeros(*x_TED.shape[:2], len(columns.targets))
    outputs_ITEN = outputs_of(replace(episodes, query_x_TECHW=x_TED, query_y_TE=y_TEN))
    before_MN, after_MN = (in_units(columns, outputs_ITEN[step]) for step in (0, -1))
    queries = len(query_x)
    mse_N = np.square(after_MN[:queries] - query_MN).mean(0)
    return [
        Fit(
            title,
            support_x,
            support_MN[:, n],
            query_x,
            query_MN[:, n],
            x,
            before_MN[queries:, n],
            after_MN[queries:, n],
            float(mse_N[n]),
        )
        for n in range(min(TARGETS, len(columns.targets)))
    ]


def in_units(columns: Standardisation, y: torch.Tensor) -> Floats:
    """Standardised values of targets, _...N, as rows in the units of the table."""
    return columns.targets_of(y.double().cpu().numpy().reshape(-1, len(columns.targets)))
