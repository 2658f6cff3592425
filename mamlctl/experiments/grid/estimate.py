"""An estimate of a grid's time, from meta-steps and test tasks that are timed on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from mamlctl.core.events import OnEvent, Progress
from mamlctl.core.results import TIMED, Estimate, RowEstimate
from mamlctl.data.rules import per_step_settings
from mamlctl.data.tasks.episodes import Placement, Tasks
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import device_words, open_device, tensor_dtype
from mamlctl.engine.evaluation.evaluator import evaluate
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.training.cuda_graphs import Captured, runner_of
from mamlctl.engine.training.initial_state import build, evaluation_net, evaluation_plan
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.engine.training.run_code import Checked, new_code, training_tasks
from mamlctl.engine.training.schedules import first_order_at, msl_weights_at
from mamlctl.experiments.executors.local import threads_each
from mamlctl.experiments.grid.grid import Grid
from mamlctl.experiments.grid.plans import as_unimproved
from mamlctl.experiments.grid.time_left import times_tested
from mamlctl.experiments.settings import fill_defaults
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

# Meta-steps before the timed ones: the first allocates and compiles, the second records a CUDA graph.
WARM_UP = {"cpu": 1, "cuda": 3}
TASKS = 16  # timed validation tasks

# Settings without effect on the time of a meta-step: bnrs and ca, for example, only change which statistics
# and which rate it uses. Rows that differ only in these are timed once.
FREE_SETTINGS = (
    "seed",
    "init",
    "init_skip",
    "init_seed",
    "train_seed",
    "inner_lr",
    "bnrs",
    "ca",
    "meta_lr",
    "meta_lr_final",
    "min_meta_lr",
)


class Phase(NamedTuple):
    """What the cost of a meta-step depends on during a run."""

    body_only: bool
    first_order: bool
    msl: bool  # whether the query loss is computed after every inner step


@dataclass(frozen=True)
class Cost:
    """The time of the parts of a run, in seconds."""

    meta_step_s: Mapping[Phase, float]
    task_s: float  # per validation or test task
    curve_task_s: float  # per test task that is scored after every inner step


def estimate(grid: Grid, workers: int, *, offline: bool, on_event: OnEvent) -> Estimate:
    """Estimate the time of a grid by timing each kind of its meta-steps once.

    Args:
        grid: the grid.
        workers: cells at a time.
        offline: never download.
        on_event: receives progress.

    Raises:
        SettingsError, DataError: as `open_streams` does.
    """
    device = open_device(grid.rows[0].config.device, grid.rows[0].config.precision)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(threads_each(workers), threads))
    costs: dict[str, Cost] = {}
    known: Checked = {}
    rows = []
    try:
        for done, row in enumerate(grid.rows):
            on_event(Progress("timing meta-steps", done, len(grid.rows)))
            config = fill_defaults(row.config)
            # Runs with the same key have meta-steps of the same cost.
            key = repr(asdict(as_unimproved(config)) | dict.fromkeys(FREE_SETTINGS))
            if key not in costs:
                costs[key] = _measure(config, offline, on_event, known)
            rows.append(_row_estimate(row.label, config, grid.test, costs[key]))
    finally:
        torch.set_num_threads(threads)
    mean_s = statistics.mean(row.train_s + row.test_s for row in rows)
    return Estimate(
        rows=tuple(rows),
        cells=len(grid.cells),
        meta_steps=sum(row.meta_steps for row in rows) * len(grid.seeds),
        seconds=mean_s * math.ceil(len(grid.cells) / workers),
        workers=workers,
        device=device_words(device),
    )


def _row_estimate(label: str, config: TrainConfig, evaluate: EvalConfig, cost: Cost) -> RowEstimate:
    epochs = _phases(config)
    steps_s = sum(cost.meta_step_s[phase] * epochs[phase] for phase in epochs) * config.steps_per_epoch
    validation_s = cost.task_s * config.val_tasks * config.epochs
    curves = per_step_settings(evaluate, config).curve_tasks
    task_s = cost.task_s * (evaluate.tasks - curves) + cost.curve_task_s * curves
    test_s = task_s * times_tested(config, evaluate)
    return RowEstimate(
        label, config.total_steps, steps_s / config.total_steps, steps_s + validation_s, test_s
    )


def _phases(config: TrainConfig) -> Counter[Phase]:
    """The number of epochs in each phase."""
    return Counter(_phase(config, epoch) for epoch in range(config.epochs))


def _phase(config: TrainConfig, epoch: int) -> Phase:
    weights = msl_weights_at(config, epoch)
    return Phase(config.trains_body_only(epoch), first_order_at(config, epoch), any(weights[:-1]))


def _measure(config: TrainConfig, offline: bool, on_event: OnEvent, known: Checked) -> Cost:
    """The median time of a meta-step in each phase, and the better of two times for a validation task."""
    device = open_device(config.device, config.precision)
    streams, source = open_streams(
        config,
        ("train", "val"),
        Placement(device, tensor_dtype(config.precision)),
        offline=offline,
        on_event=on_event,
    )
    code = new_code(config, source, on_event, known=known)
    streams["train"] = training_tasks(streams["train"], code, config.seed)
    shape, classes = source.example_shape, source.classes.get("train")
    meta_step_s: dict[Phase, float] = {}
    for phase in _phases(config):
        net, state = build(config, shape, device, classes=classes, targets=source.targets, parts=code.parts)
        runner = runner_of(MetaStep(config, net, state))
        epoch = next(epoch for epoch in range(config.epochs) if _phase(config, epoch) == phase)
        for _ in range(WARM_UP[device.type]):
            _one_step(config, runner, streams["train"], epoch)
        once = partial(_one_step, config, runner, streams["train"], epoch)
        seconds = [_timed(once, device) for _ in range(TIMED)]
        meta_step_s[phase] = statistics.median(seconds)
    task_s, curve_task_s = (
        min(
            _timed(partial(_some_tasks, config, net, state, streams["val"], curves), device) for _ in range(2)
        )
        / TASKS
        for curves in (0, TASKS)
    )
    return Cost(meta_step_s, task_s, curve_task_s)


def _one_step(config: TrainConfig, runner: MetaStep | Captured, stream: Tasks, epoch: int) -> None:
    measured = runner.measure(stream.episodes(0, config.meta_batch_size), epoch, measure_all=False)
    runner.apply(measured, epoch, 0.0)


def _some_tasks(config: TrainConfig, net: Net, state: MetaState, stream: Tasks, curve_tasks: int) -> None:
    evaluate(
        select_derivatives(evaluation_net(config, net), state.example_tensor, config.engine),
        [state],
        stream,
        replace(evaluation_plan(config, TASKS), curve_tasks=curve_tasks),
    )


def _timed(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
