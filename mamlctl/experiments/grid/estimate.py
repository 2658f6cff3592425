"""How long a grid will take, from meta-steps and test tasks measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mamlctl.core.events import OnEvent, Progress
from mamlctl.core.results import TIMED, Estimate, RowEstimate
from mamlctl.data.tasks.episodes import Tasks
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import device_words, open_device, tensor_dtype
from mamlctl.engine.evaluation.evaluator import evaluate
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.cuda_graphs import Captured, runner_of
from mamlctl.engine.training.initial_state import build, evaluation_net
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.engine.training.schedules import first_order_at
from mamlctl.engine.training.trainer import KEPT
from mamlctl.experiments.executors.local import threads_each
from mamlctl.experiments.grid.grid import Grid
from mamlctl.experiments.grid.plans import as_unimproved
from mamlctl.experiments.settings import fill_defaults
from mamlctl.settings.schema import TrainConfig

# Meta-steps that are not timed: the first allocates and compiles; a CUDA graph is recorded in the second.
WARM_UP = {"cpu": 1, "cuda": 3}

TASKS = 16  # validation tasks that are timed


def estimate(grid: Grid, workers: int, *, offline: bool, on_event: OnEvent) -> Estimate:
    """Measure every kind of meta-step that the grid has, each once. Raises what opening the data does."""
    device = open_device(grid.rows[0].config.device, grid.rows[0].config.precision)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(threads_each(workers), threads))
    try:
        measured: dict[str, Mapping[Any, float]] = {}
        rows = []
        for done, row in enumerate(grid.rows):
            on_event(Progress("measuring meta-steps", done, len(grid.rows)))
            rows.append(_row(row.label, fill_defaults(row.config), grid, measured, offline, on_event))
    finally:
        torch.set_num_threads(threads)
    each = sum(row.train_s + row.test_s for row in rows)
    return Estimate(
        tuple(rows),
        len(grid.cells),
        sum(row.meta_steps for row in rows) * len(grid.seeds),
        each / len(rows) * math.ceil(len(grid.cells) / workers),
        workers,
        device_words(device),
    )


def _row(
    label: str,
    config: TrainConfig,
    grid: Grid,
    measured: dict[str, Mapping[Any, float]],
    offline: bool,
    on_event: OnEvent,
) -> RowEstimate:
    alike = _cost_key(config)
    if alike not in measured:
        measured[alike] = _measure(config, offline, on_event)
    times = measured[alike]
    phases = _phases(config)
    steps_s = sum(times[phase] * epochs for phase, epochs in phases.items()) * config.steps_per_epoch
    validation_s = times["task"] * config.val_tasks * config.epochs
    orders = grid.evaluate.label_permutations
    test_s = times["task"] * grid.evaluate.tasks * orders * min(config.epochs, KEPT)
    return RowEstimate(
        label, config.total_steps, steps_s / config.total_steps, steps_s + validation_s, test_s
    )


def _cost_key(config: TrainConfig) -> str:
    """The same for runs whose meta-steps cost the same: neither seed nor meta learning rate counts."""
    same: dict[str, Any] = dict.fromkeys(
        (
            "seed",
            "init_seed",
            "train_seed",
            "ca",
            "min_meta_lr",
            "meta_lr",
            "meta_lr_final",
            "bnrs",
            "inner_lr",
        )
    )
    return repr(asdict(as_unimproved(config)) | same)


def _phases(config: TrainConfig) -> Counter[Any]:
    """Epochs of each kind of meta-step: its order, and whether queries are passed after every inner step."""
    return Counter(_kind(config, epoch) for epoch in range(config.epochs))


def _kind(config: TrainConfig, epoch: int) -> tuple[bool, bool]:
    return first_order_at(config, epoch), config.msl and epoch < (config.msl_epochs or 0)


def _measure(config: TrainConfig, offline: bool, on_event: OnEvent) -> dict[Any, float]:
    """Median seconds of a meta-step of each phase, and of a validation task ("task")."""
    device = open_device(config.device, config.precision)
    streams, source = open_streams(
        config,
        ("train", "val"),
        device,
        tensor_dtype(config.precision),
        offline=offline,
        on_event=on_event,
    )
    times: dict[Any, float] = {}
    for phase in _phases(config):
        net, state = build(config, source.example_shape, device, classes=source.classes.get("train"))
        runner = runner_of(MetaStep(config, net, state))
        epoch = next(epoch for epoch in range(config.epochs) if _kind(config, epoch) == phase)
        for _ in range(WARM_UP[device.type]):
            _one_step(config, runner, streams["train"], epoch)
        once = partial(_one_step, config, runner, streams["train"], epoch)
        seconds = [_timed(once, device) for _ in range(TIMED)]
        times[phase] = statistics.median(seconds)
    some_tasks = partial(_some_tasks, config, net, state, streams["val"])
    times["task"] = min(_timed(some_tasks, device) for _ in range(2)) / TASKS
    return times


def _one_step(config: TrainConfig, runner: MetaStep | Captured, stream: Tasks, epoch: int) -> None:
    measured = runner.measure(stream.episodes(0, config.meta_batch_size), epoch, measure_all=False)
    runner.apply(measured, epoch, 0.0)


def _some_tasks(config: TrainConfig, net: Net, state: MetaState, stream: Tasks) -> None:
    evaluate(
        select_derivatives(evaluation_net(config, net), state.example_tensor, config.engine),
        [state],
        stream,
        tasks=TASKS,
        inner_steps=config.evaluation_inner_steps,
        statistics=Statistics(config.bn),
        predict=ALGORITHMS[config.algo].predict(config),
    )


def _timed(work: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
