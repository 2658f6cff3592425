"""`train`: a new run, or one that goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mamlctl.core.errors import DataError, DivergedError, SettingsError
from mamlctl.core.events import Notice, OnEvent, RunStarted
from mamlctl.core.files import write_json
from mamlctl.core.results import TrainResult
from mamlctl.data.tasks.episodes import Tasks
from mamlctl.data.tasks.streams import TaskSource, open_streams
from mamlctl.engine.derivatives.selection import slower_than_it_could_be
from mamlctl.engine.devices import device_problems, device_words, open_device, tensor_dtype
from mamlctl.engine.nets.base import CLASSIFICATION
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.environment import environment
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.settings import fill_defaults
from mamlctl.run_folder import CLASSES, ENVIRONMENT, RunFolder, RunState, default_run_path, new_run, open_run
from mamlctl.settings.schema import TrainConfig


def train(
    config: TrainConfig,
    *,
    out: Path | None,
    offline: bool,
    time_limit_s: float | None,
    command: str,
    on_event: OnEvent,
) -> TrainResult:
    """Train from the beginning into a new run folder (`out`, or one under runs/).

    Raises SettingsError, DataError or MamlctlError before the folder is made, DivergedError after.
    """
    started = time.monotonic()
    completed = fill_defaults(config)
    device = _open_device(completed, config.cuda_graph)
    streams, source = open_streams(
        completed,
        ("train", "val"),
        device,
        tensor_dtype(completed.precision),
        offline=offline,
        on_event=on_event,
    )
    path = out or default_run_path(completed)
    facts = environment(completed, source, device)
    with new_run(path, config, completed, command=command, environment=facts) as run:
        if source.names:
            write_json(run.path / CLASSES, source.names)
        return _run(run, completed, streams, source, device, started, time_limit_s, on_event, resume=False)


def resume(
    path: Path,
    moved: Mapping[str, Any],
    *,
    offline: bool,
    time_limit_s: float | None,
    command: str,
    on_event: OnEvent,
) -> TrainResult:
    """Go on with a run from its last checkpoint, as if nothing had happened.

    `moved`: values of run_folder.RESUME_OVERRIDES settings instead of the run's own. Raises what `train`
    does; MamlctlError for a damaged run, DataError if the data are no longer those of the run.
    """
    started = time.monotonic()
    run = open_run(path)
    with run.writing():
        run.config = replace(run.config, **moved)
        completed = fill_defaults(run.config)
        device = _open_device(completed, moved.get("cuda_graph"))
        streams, source = open_streams(
            completed,
            ("train", "val"),
            device,
            tensor_dtype(completed.precision),
            offline=offline,
            on_event=on_event,
        )
        trained_on = run.environment().get("dataset_digest", source.digest)
        if trained_on != source.digest:
            found = f"{run.config.dataset} has digest {source.digest:.12}"
            message = f"{found}, but the run began with {trained_on:.12}"
            raise DataError(message, hint="resume with the --data-root, and the Pillow, that it began with")
        with (run.path / "command.txt").open("a") as file:
            file.write(command + "\n")
        if not run.environment():  # stopped before it was written
            write_json(run.path / ENVIRONMENT, environment(completed, source, device))
            if source.names:
                write_json(run.path / CLASSES, source.names)
        return _run(run, completed, streams, source, device, started, time_limit_s, on_event, resume=True)


def _open_device(config: TrainConfig, cuda_graph: bool | None) -> torch.device:
    """`cuda_graph`: as asked for now; a run that had graphs may go on where there are none."""
    if problems := device_problems(config.device, config.precision, cuda_graph):
        raise SettingsError(problems)
    return open_device(config.device, config.precision)


def _run(
    run: RunFolder,
    config: TrainConfig,
    streams: Mapping[str, Tasks],
    source: TaskSource,
    device: torch.device,
    started: float,
    time_limit_s: float | None,
    on_event: OnEvent,
    *,
    resume: bool,
) -> TrainResult:
    net, state = build(config, source.example_shape, device, classes=source.classes.get("train"))
    judged_net, _ = build(config, source.example_shape, torch.device("meta"))
    if slower := slower_than_it_could_be(net, state.example_tensor, config.engine):
        on_event(Notice(slower))
    with StopRequests(on_event, time_limit_s=time_limit_s, started=started) as stop:
        trainer = Trainer(
            config,
            net,
            state,
            streams,
            run,
            device=device,
            on_event=on_event,
            stop_reason=stop.reason,
            judged_net=judged_net,
        )
        if resume and not trainer.last.exists():
            on_event(Notice(f"{run.path} has no checkpoint yet: starting from the beginning"))
            run.rewind_metrics(0, 0)
        elif resume:
            trainer.resume()
            if trainer.position.validated == config.epochs:
                on_event(Notice(f"{run.path} is finished already"))
        on_event(_run_started(run, trainer, device))
        run.set_state(RunState("running", trainer.position.step))
        end = RunState("failed", reason="a bug or the machine: see the error")
        try:
            reason = trainer.train()
            end = RunState("interrupted" if reason else "finished", reason=reason)
        except DivergedError as error:
            step = trainer.position.step if error.step is None else error.step
            end = RunState("diverged", reason=error.message, diverged_at=step)
            raise
        except KeyboardInterrupt:
            end = RunState("interrupted", reason="left at once")
            raise
        finally:
            run.set_state(replace(end, step=trainer.position.step))
    best_epoch, best_score, best_ci95 = trainer.position.top[0] if trainer.position.top else (None,) * 3
    return TrainResult(
        run=str(run.path),
        status="interrupted" if reason else "finished",
        reason=reason,
        step=trainer.position.step,
        total_steps=config.total_steps,
        metric=net.objective.metric,
        best_val_score=best_score,
        best_val_ci95=best_ci95,
        best_epoch=None if best_epoch is None else int(best_epoch),
        val_tasks=config.val_tasks,
        bn=config.bn if net.norm_layers else "none",
        seconds=time.monotonic() - started,
    )


def _run_started(run: RunFolder, trainer: Trainer, device: torch.device) -> RunStarted:
    config, net = trainer.config, trainer.net
    return RunStarted(
        run=str(run.path),
        dataset=config.dataset,
        algo=config.algo,
        improvements=config.improvements,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        meta_batch_size=config.meta_batch_size,
        inner_steps=config.inner_steps,
        epochs=config.epochs,
        steps_per_epoch=config.steps_per_epoch,
        first_step=trainer.position.step,
        parameters=sum(tensor.numel() for tensor in trainer.meta_step.learnable.values()),
        metric=net.objective.metric,
        guesses=net.outputs if net.objective is CLASSIFICATION else 0,
        device=device_words(device),
        bn=config.bn if net.norm_layers else "none",
        val_tasks=config.val_tasks,
    )
