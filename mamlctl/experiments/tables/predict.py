"""Predictions for a new task by a run that is adapted to a table of its examples (`eval --support`)."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import OnEvent
from mamlctl.core.files import write_text
from mamlctl.core.formatting import csv_cell
from mamlctl.core.results import TablePrediction
from mamlctl.data.reading.table_files import Columns, Floats
from mamlctl.data.reading.tables import read_examples
from mamlctl.experiments.tables.plots import fits_of
from mamlctl.experiments.tables.table_model import open_table_model
from mamlctl.report.figures import fit_figures
from mamlctl.report.figures.style import save
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig


@dataclass(frozen=True)
class PredictionFiles:
    """The tables of a new task, and the files to write."""

    support: Path
    query: Path | None = None
    csv: Path | None = None
    plot: bool = False
    export: Path | None = None


def predict_table(
    path: Path, settings: EvalConfig, files: PredictionFiles, *, on_event: OnEvent
) -> TablePrediction:
    """Adapt a run's best checkpoint to one table and predict another; its training data are not needed.

    Args:
        path: the run folder.
        settings: the settings of the evaluation.
        files: the tables, and the files to write.
        on_event: receives notices.

    Raises:
        SettingsError: the run does not support the settings.
        DataError: a table cannot be read, or lacks a column or a number.
        DivergedError: a prediction is not finite.
        MamlctlError: the run is damaged.
    """
    started = time.monotonic()
    if files.csv is not None and files.csv.is_dir():
        raise SettingsError([(f"--csv {files.csv} is a folder", "use the name of a file")])
    run = open_run(path)
    model = open_table_model(run, settings, on_event)
    config, values = model.config, model.values
    columns = Columns(values.inputs, values.targets)
    if files.plot and len(columns.inputs) > 1:
        fact = (
            f"--plot draws curves of one input with --support, but the run has {len(columns.inputs)} inputs"
        )
        raise SettingsError([(fact, "leave it out")])
    support_x, support_y = read_examples(files.support, columns)
    if support_y is None:
        fact = f"{files.support} has no column {columns.targets[0]!r}"
        raise DataError(fact, hint="a model adapts to examples with known targets: add them")
    query_x, query_y = np.empty((0, len(columns.inputs))), None
    if files.query is not None:
        query_x, query_y = read_examples(files.query, columns)
    support = model.task((support_x, support_y))
    predicted = model.predictions(support, query_x)
    exported = None  # first, since nothing is written if it fails
    if files.export is not None:
        from mamlctl.experiments.export.models import export_table  # imports torch.export

        rows = np.concatenate([query_x, support_x])
        exported = export_table(files.export, model, support, rows, on_event)
    pictures: tuple[str, ...] = ()
    if files.plot and files.query is not None:
        unknown_y = np.full((len(query_x), len(columns.targets)), np.nan)
        episodes = model.with_queries(support, query_x, unknown_y if query_y is None else query_y)
        row = fits_of(lambda sets: model.outputs(sets, True), episodes, values, files.query.name)
        title = f"{config.algo}, {run.path.name}"
        figure = fit_figures.fits([row], (columns.inputs[0], columns.targets), title)
        pictures = tuple(map(str, save(figure, run.path / "plots" / "own-task")))
    if files.csv is not None:
        _write_csv(files.csv, columns, query_x, predicted, query_y)
    return TablePrediction(
        run=str(path),
        algo=config.algo,
        model=model.name,
        inputs=columns.inputs,
        targets=columns.targets,
        support_rows=len(support_x),
        inner_steps=config.evaluation_inner_steps,
        x=_tuples(query_x),
        predicted=_tuples(predicted),
        truth=None if query_y is None else _tuples(query_y),
        seconds=time.monotonic() - started,
        pictures=pictures,
        csv=None if files.csv is None else str(files.csv),
        exported=exported,
    )


def _tuples(values_MC: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values_MC.tolist()))


def _write_csv(
    path: Path, columns: Columns, x_MD: Floats, predicted_MN: Floats, truth_MN: Floats | None
) -> None:
    """Write one line per query row: the inputs, the known targets, and the predictions."""
    text = io.StringIO()
    writer = csv.writer(text)
    known: Sequence[Floats] = [] if truth_MN is None else [truth_MN]
    names = [
        *columns.inputs,
        *(columns.targets if known else ()),
        *(f"predicted {name}" for name in columns.targets),
    ]
    writer.writerow(map(csv_cell, names))
    writer.writerows(np.concatenate([x_MD, *known, predicted_MN], axis=1).tolist())
    write_text(path, text.getvalue())
