"""Predictions for a new task by a run that is adapted to a table of its examples (`eval --support`)."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mamlctl.core.errors import DataError, DivergedError, SettingsError
from mamlctl.core.events import OnEvent
from mamlctl.core.files import write_text
from mamlctl.core.formatting import csv_cell
from mamlctl.core.results import TablePrediction
from mamlctl.data.reading.table_files import Columns, Floats
from mamlctl.data.reading.tables import read_examples
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.streams import own_task
from mamlctl.data.tasks.table_tasks import Standardisation
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.run_code import code_of_run
from mamlctl.experiments.evaluation_settings import evaluation_setup
from mamlctl.experiments.tables.plots import fits_of, in_units
from mamlctl.experiments.tables.stored import stored_facts
from mamlctl.experiments.trained_model import checkpoint_files, load_states
from mamlctl.report.figures import fit_figures
from mamlctl.report.figures.style import save
from mamlctl.run_folder import RunFolder, open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

CHUNK = 2**16  # rows that are predicted at once
# A task, and whether to predict after every inner step -> outputs_ITEN of its queries.
Predictor = Callable[[Episodes, bool], torch.Tensor]


@dataclass(frozen=True)
class PredictionFiles:
    """The tables of a new task, and the files to write."""

    support: Path
    query: Path
    csv: Path | None = None
    plot: bool = False


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
    values = stored_facts(run).standardisation
    config, device, _ = evaluation_setup(run, settings, on_event)
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
    query_x, query_y = read_examples(files.query, columns)
    outputs_of, name = _adapting(run, config, settings, values, device, on_event)
    support = _episode(config, values, (support_x, support_y), device)
    predicted = _predictions(outputs_of, support, values, query_x)
    pictures: tuple[str, ...] = ()
    if files.plot:
        unknown_y = np.full((len(query_x), len(columns.targets)), np.nan)
        episodes = _with_queries(support, values, query_x, unknown_y if query_y is None else query_y)
        row = fits_of(lambda sets: outputs_of(sets, True), episodes, values, files.query.name)
        title = f"{config.algo}, {run.path.name}"
        figure = fit_figures.fits([row], (columns.inputs[0], columns.targets), title)
        pictures = tuple(map(str, save(figure, run.path / "plots" / "own-task")))
    if files.csv is not None:
        _write_csv(files.csv, columns, query_x, predicted, query_y)
    return TablePrediction(
        run=str(path),
        algo=config.algo,
        model=name,
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
    )


def _adapting(
    run: RunFolder,
    config: TrainConfig,
    settings: EvalConfig,
    values: Standardisation,
    device: torch.device,
    on_event: OnEvent,
) -> tuple[Predictor, str]:
    """The function that adapts the best checkpoint and predicts, and the name of that checkpoint."""
    shape, settings = (len(values.inputs),), replace(settings, models="best")
    files, _ = checkpoint_files(run, settings.checkpoint, on_event)
    code = code_of_run(run)
    states, epochs, _ = load_states(run, files, settings, shape, device, on_event, code=code)
    net, _ = build(config, shape, torch.device("meta"), targets=len(values.targets), parts=code.parts)
    derivatives = select_derivatives(net, states[0].example_tensor, config.engine)
    predict, state = ALGORITHMS[config.algo].predict(config), states[0].frozen()

    @torch.no_grad()
    def outputs_of(episodes: Episodes, per_step: bool) -> torch.Tensor:
        sets, steps = TaskSets(derivatives, episodes), config.evaluation_inner_steps
        return predict(PredictRequest(sets, state, steps, Statistics(config.bn), per_step))

    return outputs_of, f"best, epoch {epochs[0]}" if epochs else "last"


def _episode(
    config: TrainConfig, values: Standardisation, support: tuple[Floats, Floats], device: torch.device
) -> Episodes:
    """The support set as a task without queries."""
    dtype = tensor_dtype(config.precision)
    scaled = torch.from_numpy(values.apply(np.concatenate(support, axis=1))).to(device, dtype)
    parts = torch.tensor_split(scaled, [len(values.inputs)], dim=1)
    return own_task(config, *(part.contiguous() for part in parts))


def _with_queries(support: Episodes, values: Standardisation, x_MD: Floats, y_MN: Floats) -> Episodes:
    like, width = support.support_x_TECHW, len(values.inputs)
    scaled = torch.from_numpy(values.apply(np.concatenate([x_MD, y_MN], axis=1))).to(like).unsqueeze(0)
    return replace(support, query_x_TECHW=scaled[..., :width].contiguous(), query_y_TE=scaled[..., width:])


def _predictions(outputs_of: Predictor, support: Episodes, values: Standardisation, x_MD: Floats) -> Floats:
    """The predictions for all queries, in chunks, so that memory does not grow with their number."""
    parts = []
    for first in range(0, len(x_MD), CHUNK):
        chunk_MD = x_MD[first : first + CHUNK]
        unknown_MN = np.zeros((len(chunk_MD), len(values.targets)))
        outputs_ITEN = outputs_of(_with_queries(support, values, chunk_MD, unknown_MN), False)
        parts.append(in_units(values, outputs_ITEN[-1]))
    predicted_MN = np.concatenate(parts)
    if not np.isfinite(predicted_MN).all():
        hint = "use fewer --inner-steps, a lower --inner-lr, or another run"
        raise DivergedError("the adapted model's predictions are not finite", hint=hint)
    return predicted_MN


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
