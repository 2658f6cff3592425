"""The time that is left, from the speed of a run so far, or from a few timed meta-steps of its experiment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mamlctl.core.errors import MamlctlError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import read_object, write_json
from mamlctl.engine.devices import cpu_model, device_words, open_device
from mamlctl.experiments.grid.estimate import estimate
from mamlctl.experiments.grid.grid import Grid, GridRow
from records.experiments import Experiment
from records.runs import Place, RecordedRun

FILE = "estimates.json"


def timed(experiment: Experiment, place: Place, runs: Path, on_event: OnEvent | None) -> dict[str, Any]:
    """The seconds of a meta-step and of one test on this device, measured once and then stored.

    Args:
        experiment: the experiment.
        place: where it would run.
        runs: the folder that stores the times.
        on_event: receives notices; None: do not measure what is not stored.

    Returns:
        `step_s` (including its share of validation) and `test_s`, or `problem` if it cannot run here; empty
        if they are not stored and not measured.
    """
    key = f"{experiment.name} on {', '.join(machine(experiment, place))}, torch {torch.__version__}"
    stored = read_object(runs / FILE)
    match stored.get(key):
        case {"stated": experiment.stated, "step_s": float(), "test_s": float()} as known:
            return known
    if on_event is None:
        return {}
    config = replace(experiment.config, device=place.device, data_root=place.data_root)
    row = GridRow(experiment.name, experiment.name, config)
    grid = Grid(runs, "one row", (row,), (0,), experiment.test, command="")
    on_event(Notice(f"{experiment.name}: timing a few meta-steps"))
    try:
        (cost,) = estimate(grid, 1, offline=True, on_event=lambda event: None).rows
    except MamlctlError as error:
        return {"problem": error.message}
    times = {"step_s": cost.train_s / cost.meta_steps, "test_s": cost.test_s}
    runs.mkdir(parents=True, exist_ok=True)
    write_json(runs / FILE, {**stored, key: {"stated": experiment.stated, **times}})
    return times


def machine(experiment: Experiment, place: Place) -> tuple[str, str]:
    """The device and the processor on which the experiment would run."""
    return device_words(open_device(place.device, experiment.config.precision)), cpu_model()


def seconds_left(run: RecordedRun, times: dict[str, Any], place: Place) -> float | None:
    """The time until the run has a receipt; None if it is unknown.

    Args:
        run: the run.
        times: what `timed` returned for its experiment.
        place: where it would run. If a part of it ran elsewhere, its speed so far does not count.
    """
    if run.obstacle or "problem" in times:
        return None
    if run.is_trained:
        training_s: float | None = 0.0
    else:
        step_s = times.get("step_s")
        here = machine(run.experiment, place)
        places = [part["environment"] for part in run.slices]
        if run.step and places and all((part["device"], part["cpu"]) == here for part in places):
            step_s = run.wall_s / run.step
        steps, minutes = run.experiment.config.total_steps - run.step, run.experiment.minutes
        limits = [None if step_s is None else steps * step_s]
        limits += [None if minutes is None else 60 * minutes - run.wall_s]
        training_s = min((limit for limit in limits if limit is not None), default=None)
    if training_s is None:
        return None
    return max(training_s, 0.0) + times.get("test_s", 0.0) * len(run.untested)
