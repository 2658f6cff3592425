"""Training of a new run, or of one that is resumed (`train`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from mamlctl.core import formatting
from mamlctl.core.errors import DataError, DivergedError, MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent, RunStarted, Waiting
from mamlctl.core.files import append_text, check_out, write_json
from mamlctl.core.formatting import plural
from mamlctl.core.metrics_rows import rows_of
from mamlctl.core.results import TrainResult
from mamlctl.core.user_code.references import folder_name
from mamlctl.data.tasks.episodes import Placement, Tasks
from mamlctl.data.tasks.streams import Stored, TaskSource, open_streams
from mamlctl.data.tasks.table_tasks import different_tasks
from mamlctl.data.user_tasks.stream import CHANGED as CHANGED_TASKS
from mamlctl.engine.algorithms.rules import slower_because_of_loss
from mamlctl.engine.derivatives.selection import slower_than_it_could_be
from mamlctl.engine.devices import device_problems, device_words, open_device, tensor_dtype
from mamlctl.engine.distributed import current
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net, bn_mode
from mamlctl.engine.training.checkpoints import BEST, LAST, PREVIOUS
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.run_code import RunCode, code_of_run, new_code, store_code, training_tasks
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.environment import environment, kernels_announced
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.processes.together import TrainingJob, check_code_of_ranks, check_sharing, send_after
from mamlctl.experiments.runs.starts import apply_start, start_again
from mamlctl.experiments.settings import fill_defaults
from mamlctl.experiments.tables.stored import store_facts
from mamlctl.experiments.training_images import check_folder, store_digests, stored_split
from mamlctl.run_folder import (
    CLASSES,
    COMMANDS,
    ENVIRONMENT,
    METRICS,
    STATUS,
    RunFolder,
    RunState,
    new_run,
    open_run,
)
from mamlctl.settings.merge import stored_settings
from mamlctl.settings.schema import TrainConfig
from mamlctl.settings.variables import runs_folder


@dataclass(frozen=True)
class Prepared:
    """What training needs besides its run folder."""

    config: TrainConfig  # with all derived values
    device: torch.device
    streams: Mapping[str, Tasks]
    source: TaskSource
    net: Net
    state: MetaState
    code: RunCode
    stop: StopRequests
    on_event: OnEvent


def train(
    config: TrainConfig,
    *,
    out: Path | None,
    offline: bool,
    time_limit_s: float | None,
    command: str,
    on_event: OnEvent,
    code: RunCode | None = None,
) -> TrainResult:
    """Train a new run.

    Args:
        config: the settings; those that are None are derived.
        out: the run folder; None for a new one in the folder of runs.
        offline: never download.
        time_limit_s: seconds until the run saves and stops; None for no limit.
        command: the command line, for command.txt.
        on_event: receives progress, reports and notices.
        code: of another run, in place of the one that the settings name.

    Raises:
        SettingsError, DataError, MamlctlError: before the run folder is created.
        DivergedError: a loss or a gradient is not finite.
    """
    check_out(out or runs_folder())  # before data are downloaded
    stop = StopRequests(on_event, time_limit_s=time_limit_s)
    check_sharing(config, on_event)
    prepared = prepare(TrainingJob(config, config.cuda_graph, offline), stop, on_event, code)
    started = apply_start(prepared.config, prepared.net, prepared.state, on_event)
    path = out or _default_path(prepared.config)
    facts = environment(prepared.config, prepared.source, prepared.device)
    with new_run(path, config, prepared.config, command=command, environment=facts) as run:
        store_code(run.path, prepared.code)
        if started is not None:
            started.store(run.path)
        _store_data_facts(run, prepared.source)
        return _run(run, prepared, resume=False)


def _default_path(config: TrainConfig) -> Path:
    """A new folder in the folder of runs, named after the run's main settings and the time of its start."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    ways = f"{config.ways}w" if config.ways > 1 else ""  # curves have none
    name = f"{folder_name(config.dataset)}-{ways}{config.shots}s-{config.algo}-s{config.seed}-{now}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in map(runs_folder().joinpath, names) if not path.exists())


def resume(
    path: Path,
    overrides: Mapping[str, Any],
    *,
    offline: bool,
    time_limit_s: float | None,
    command: str,
    on_event: OnEvent,
) -> TrainResult:
    """Resume a run from its last checkpoint, with the same result as without the interruption.

    Args:
        path: the run folder.
        overrides: new values of settings in run_folder.RESUME_OVERRIDES, and `dataset` if the images of the
            run have moved to another folder.
        offline: never download.
        time_limit_s: seconds until the run saves and stops; None for no limit.
        command: the command line, for command.txt.
        on_event: receives progress, reports and notices.

    Raises:
        SettingsError: an override is invalid.
        DivergedError: as `train` does.
        MamlctlError: the run is damaged, or another process is writing to it.
        DataError: the data differ from those with which the run started.
    """
    stop = StopRequests(on_event, time_limit_s=time_limit_s)
    run = open_run(path)
    with run.writing():
        if "dataset" not in overrides:
            check_folder(run, f"mamlctl train --resume {path}")
        elif run.dataset_digest is None:
            fact = f"{run.path} has no digest of its data, so {overrides['dataset']} cannot be compared"
            raise DataError(fact, hint=f"move the images back to {run.config.dataset}")
        changed = {name: value for name, value in overrides.items() if name != "dataset"}
        run.config = stored_settings("flag", {**asdict(run.config), **changed})
        # Checkpoints belong to the path with which the run started, so `run.config` keeps it.
        config = replace(run.config, dataset=overrides.get("dataset", run.config.dataset))
        code, split = code_of_run(run), stored_split(run)
        for notice in code.notices:
            on_event(Notice(notice))
        check_sharing(config, on_event)
        cuda_graph, code_of = overrides.get("cuda_graph"), run.path.absolute() if code.stored else None
        job = TrainingJob(config, cuda_graph, offline, code_of, split)
        prepared = prepare(job, stop, on_event, code, code.tasks or split)
        source = prepared.source
        if not run.trained_on(source.digest, source.older_digests):
            now = f"{config.dataset} has digest {source.digest:.12}"
            fact = f"{now}, but the run started with {run.dataset_digest:.12}"
            hint = "resume with the same images, --data-root and version of Pillow as before"
            if source.table is not None:
                hint = "resume with the rows and columns with which it started, or train a new run"
            if source.user_tasks is not None:
                fact = f"the tasks of {run.path} are not those with which it started"
                hint = CHANGED_TASKS
            raise DataError(fact, hint=hint)
        append_text(run.path / COMMANDS, command + "\n")
        if not run.environment():  # the run was killed before it wrote these files
            write_json(run.path / ENVIRONMENT, environment(prepared.config, source, prepared.device))
        _store_data_facts(run, source)
        return _run(run, prepared, resume=True)


def _store_data_facts(run: RunFolder, source: TaskSource) -> None:
    """Write which classes, images or table the run is trained on, unless the folder has these files.

    Raises DataError if it has other facts about a table.
    """
    if source.names and not (run.path / CLASSES).exists():
        write_json(run.path / CLASSES, source.names)
    store_digests(run, source)
    store_facts(run, source.table)


def prepare(
    job: TrainingJob,
    stop: StopRequests,
    on_event: OnEvent,
    code: RunCode | None = None,
    stored: Stored | None = None,
) -> Prepared:
    """Open the device and the data, and build the network; rank 0 sends the job to the others in between.

    Args:
        job: the run.
        stop: the requests to stop it.
        on_event: receives progress and notices.
        code: that of a resumed run.
        stored: what a resumed run has of the user's own data.

    Raises:
        SettingsError: this machine does not have the device, or has other code than that of rank 0.
        DataError: as `open_streams` does.
    """
    completed = fill_defaults(job.config)
    if problems := device_problems(completed.device, completed.precision, job.cuda_graph):
        raise SettingsError(problems)
    device = open_device(completed.device, completed.precision)
    place = Placement(device, tensor_dtype(completed.precision))
    on_event(Waiting.for_data(completed.dataset))
    with send_after(job, on_event) as show:
        streams, source = open_streams(
            completed, ("train", "val"), place, offline=job.offline, on_event=show, stored=stored
        )
    if code is None:
        code = new_code(completed, source, on_event, like=torch.empty((), device=device, dtype=place.dtype))
    check_code_of_ranks(code)
    classes = source.classes.get("train")
    net, state = build(
        completed, source.example_shape, device, classes=classes, targets=source.targets, parts=code.parts
    )
    streams["train"] = training_tasks(streams["train"], code, completed.seed)
    return Prepared(completed, device, streams, source, net, state, code, stop, on_event)


def _run(run: RunFolder, prepared: Prepared, *, resume: bool) -> TrainResult:
    config, source, stop, on_event = prepared.config, prepared.source, prepared.stop, prepared.on_event
    net, state = prepared.net, prepared.state
    with stop:
        with kernels_announced(prepared.device, on_event):
            trainer = Trainer(
                config, net, state, prepared.streams, run, on_event=on_event, stop_reason=stop.reason
            )
        slower = slower_than_it_could_be(net, state.example_tensor, config.engine)
        if slower := slower or slower_because_of_loss(config):
            on_event(Notice(slower))
        if resume and not any((run.checkpoints / name).exists() for name in (LAST, PREVIOUS)):
            # A folder whose transfer from a Ray node was cut off has no status: the metrics come before the
            # checkpoint, and the status comes last.
            # A model that ships has a best checkpoint, but no metrics.
            found = "reports" if run.metrics() else BEST if (run.checkpoints / BEST).exists() else ""
            if found and (run.path / STATUS).exists():
                fact = f"{run.path} has {found}, but neither {LAST} nor {PREVIOUS} in its checkpoints folder"
                raise MamlctlError(fact, hint="restore one of them, or train a new run with another --out")
            on_event(Notice(f"{run.path} has no checkpoint yet: starting from the beginning"))
            start_again(run, config, net, state, on_event)
            run.rewind_metrics(0, 0)
        elif resume:
            trainer.resume()
            if lost := _lost_reports(run, trainer):
                on_event(Notice(lost))
            if trainer.position.validated == config.epochs:
                on_event(Notice(f"{run.path} is already finished"))
        trainer.share(current())
        for what, groups in (("classes", source.names), ("tasks", source.table and source.table.tasks)):
            if groups:
                counts = " / ".join(f"{len(names)} {split}" for split, names in groups.items())
                on_event(Notice(f"{what}: {counts}"))
        on_event(_run_started(run, trainer))
        run.set_state(RunState("running", trainer.position.step))
        end = RunState("failed", reason="unexpected error; see the output")
        try:
            reason = trainer.train()
            end = RunState("interrupted" if reason else "finished", reason=reason)
        except DivergedError as error:
            step = trainer.position.step if error.step is None else error.step
            end = RunState("diverged", reason=error.cause, diverged_at=step)
            raise
        except MamlctlError as error:
            end = RunState("failed", reason=error.message)
            if isinstance(error, SettingsError):  # from the user's code, before it has changed the weights
                trainer.save_checked()
            raise
        except KeyboardInterrupt:
            end = RunState("interrupted", reason="exited without saving")
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
        val_tasks=different_tasks(prepared.streams["val"], config.val_tasks),
        bn=bn_mode(net, config.bn),
        seconds=time.monotonic() - stop.started,
        chance=1 / config.ways if net.objective.has_classes else None,
    )


def _lost_reports(run: RunFolder, trainer: Trainer) -> str:
    """What the reports of a resumed run lack because their file was deleted or shortened, or ""."""
    rows, position = run.metrics(), trainer.position
    kept = len({row["epoch"] for row in rows_of(rows, "validation")})
    if kept < position.validated:
        fact = f"has {kept} of {position.validated} {plural(position.validated, 'validation')}"
    elif not rows and position.step >= trainer.config.report_every:
        fact = "has no reports"
    else:
        return ""
    return f"{run.path / METRICS} {fact} before meta-step {position.step}"


def _run_started(run: RunFolder, trainer: Trainer) -> RunStarted:
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
        inner_lr=config.inner_lr,
        epochs=config.epochs,
        steps_per_epoch=config.steps_per_epoch,
        first_step=trainer.position.step,
        parameters=sum(tensor.numel() for tensor in trainer.meta_step.learnable.values()),
        metric=net.objective.metric,
        guesses=net.outputs if net.objective.has_classes else 0,
        device=f"{current().count} x " * (current().count > 1) + device_words(trainer.device),
        bn=bn_mode(net, config.bn),
        val_tasks=different_tasks(trainer.streams["val"], config.val_tasks),
        body_epochs=config.body_epochs,
        loss="" if net.objective.has_default_loss else formatting.loss_name(str(config.loss)),
    )
