"""A listener that writes the events of training for TensorBoard, in a file in the run folder."""

from __future__ import annotations

import importlib.util
import io
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Self, get_args

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import Event, Notice, OnEvent, RunStarted, TrainReport, ValidationDone
from mamlctl.core.files import naming
from mamlctl.core.literals import LogName, Metric
from mamlctl.core.metrics_rows import rows_of
from mamlctl.core.results import named
from mamlctl.run_folder import RunFolder, open_run
from mamlctl.settings.schema import TrainConfig

FOLDER = "tensorboard"  # in the run folder
PREFIX = "events.out.tfevents."  # of the names by which TensorBoard finds its files; then come seconds
FILE_VERSION = (
    "brain.Event:2"  # from this version on, a SessionLog says from which step on a file replaces earlier ones
)
# The number of inner steps that the first entry of each list in a row belongs to.
FIRST_ENTRY = {"query_losses": 0, "query_accuracies": 0, "msl_weights": 1}
POSITION = ("step", "epoch")  # the axis of every chart, and what follows from it


def check_log(name: str) -> None:
    """Check `--log name` before any work.

    Raises SettingsError for an unknown name, and MamlctlError if the package is not installed.
    """
    if name not in get_args(LogName):
        names = " or ".join(get_args(LogName))
        raise SettingsError([(f"--log is '{name}', which is not a kind of log", f"use {names}")])
    if importlib.util.find_spec("tensorboard") is None:
        raise MamlctlError("tensorboard is not installed", hint="pip install 'mamlctl[tensorboard]'")


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The names and values of the scalars in a row of metrics.jsonl.

    A name consists of the name of the row's field and of what distinguishes scalars of one field, which is
    the tensor and the inner step: `query_losses/0`, `rates/conv1.weight/1`. Fields with a single number come
    after the kind of the row: `report/meta_lr`, `validation/val_accuracy`.
    """
    for key, value in row.items():
        if key in FIRST_ENTRY:
            for inner_step, part in enumerate(value, FIRST_ENTRY[key]):
                yield f"{key}/{inner_step}", part
        elif key == "rates":
            for tensor, rates in value.items():
                for inner_step, rate in enumerate(rates, 1):
                    yield f"{key}/{tensor}/{inner_step}", rate
        elif isinstance(value, int | float) and key not in POSITION:
            yield f"{row['kind']}/{key}", float(value)


class TensorBoardLog:
    """Writes the scalars, the settings and the pictures of one run while its `with` block runs.

    All of it comes from events and from metrics.jsonl. Therefore a run that is resumed, or was first trained
    without this log, has every step once.
    """

    def __init__(self, complete: Callable[[TrainConfig], TrainConfig], on_event: OnEvent) -> None:
        """A log without a file, which is created when the run starts.

        Args:
            complete: fills in the derived settings of a run.
            on_event: receives every event too.
        """
        self._complete, self._on_event = complete, on_event
        self._run: RunFolder | None = None
        self._metric: Metric = "accuracy"
        self._file: BinaryIO | None = None
        self._step = 0  # the last one that was reported

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._file is not None:
            with self._file:
                if kind is None:
                    self._write_pictures()

    def __call__(self, event: Event) -> None:
        self._on_event(event)
        match event:
            case RunStarted():
                self._start(event)
            case TrainReport():
                self._write_row({"kind": "report", **vars(event)})
            case ValidationDone():
                self._write_row({"kind": "validation", **named(event)})

    def _start(self, started: RunStarted) -> None:
        """Open a new file, and write the settings and what earlier files lack."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._run = run = open_run(Path(started.run))
        self._metric, self._step = started.metric, started.first_step
        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        earlier = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")]
        # TensorBoard reads files in the order of their names; the clock of another machine may be behind.
        seconds = [int(name) + 1 for name in earlier if name.isdecimal()]
        self._file = (folder / f"{PREFIX}{max([int(time.time()), *seconds]):010}").open("xb")
        self._write(file_version=FILE_VERSION)
        kept = started.first_step if earlier else 0  # earlier files have the rows before this meta-step
        if earlier:
            # TensorBoard drops what earlier files have from this step on: `add_*(purge_step=...)` of others.
            self._write(step=kept, session_log=SessionLog(status=SessionLog.START))
        settings = asdict(self._complete(run.config))
        given = {key: value for key, value in settings.items() if value is not None}
        self._write(summary=hparams_pb(given, trial_id=run.path.name))
        for row in run.metrics():
            if row["step"] >= kept:
                self._write_row(row)
        self._on_event(Notice(f"to see the log: tensorboard --logdir {run.path.parent}"))

    def _write_row(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(row)]
        self._step = row["step"]
        self._write(step=self._step, summary=Summary(value=values))

    def _write_pictures(self) -> None:
        """Write the curves of training, and the learnt rates, as pictures of the last meta-step."""
        import numpy as np
        from tensorboard.compat.proto.summary_pb2 import Summary

        from mamlctl.report.figures import run_figures, style, training_figure

        assert self._run is not None
        metrics = self._run.metrics()
        reports = rows_of(metrics, "report")
        if not reports:
            return
        figures = {
            "training": training_figure.training(reports, rows_of(metrics, "validation"), self._metric)
        }
        if rates := reports[-1].get("rates"):
            title = f"{self._run.config.algo}, {self._run.path.name}"
            arrays = {name: np.array(values, dtype=np.float64) for name, values in rates.items()}
            figures["rates"] = run_figures.rates(arrays, self._run.config.inner_lr, title)
        for name, figure in figures.items():
            png = style.png(figure)
            width, height = struct.unpack(">II", png[16:24])  # of the header, which every PNG begins with
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            self._write(step=self._step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def _write(self, **content: Any) -> None:
        """Append an event, so that a reader has it at once."""
        from tensorboard.compat.proto.event_pb2 import Event as EventProto
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        record = io.BytesIO()
        RecordWriter(record).write(EventProto(wall_time=time.time(), **content).SerializeToString())
        with naming(self._file.name):
            self._file.write(record.getvalue())
            self._file.flush()
