"""`eval`: a trained run judged on a fixed list of tasks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mamlctl.commands.data import complete, image_shape, open_streams
from mamlctl.config import EvalConfig, TrainConfig, limit_problems
from mamlctl.data.images import PackedImages
from mamlctl.engine import checkpoints
from mamlctl.engine.devices import device_problems, device_words, open_device
from mamlctl.engine.evaluator import Scores, evaluate
from mamlctl.engine.fast import derivatives_of
from mamlctl.engine.inner import MetaState
from mamlctl.engine.norms import Statistics
from mamlctl.engine.step import build
from mamlctl.engine.trainer import epoch_file
from mamlctl.errors import SettingsError
from mamlctl.records import EvalResult, EvalRow, Notice, OnEvent, Progress
from mamlctl.runs import RunFolder, open_run, replacing, write_json
from mamlctl.stats import mean_ci95


def evaluate_run(path: Path, settings: EvalConfig, *, offline: bool, on_event: OnEvent) -> EvalResult:
    """Judge a run's best checkpoint and the ensemble of its best ones; write eval/<split>-<digest>/.

    Raises SettingsError, DataError, and MamlctlError for a run or checkpoint that is absent or damaged.
    """
    started = time.monotonic()
    run = open_run(path)
    config = complete(_judged(run.config, settings))
    if problems := limit_problems(settings) + device_problems(config.device, "float32"):
        raise SettingsError(problems)
    device = open_device(config.device, config.precision)
    if config.precision == "tf32" and device.type == "cpu":
        on_event(Notice("trained in tf32, which a CPU does not have: judged in float32"))
    files, epochs = _checkpoint_files(run, on_event)
    streams, packed = open_streams(config, (settings.split,), device, offline=offline, on_event=on_event)
    stream = streams[settings.split]
    if packed.digest != run.environment().get("dataset_digest", packed.digest):
        on_event(Notice("these data are not those of the training: classes may have moved between splits"))
    states = []
    for file in files:
        net, state = build(config, image_shape(packed), device)
        checkpoints.restore(state, checkpoints.load(file, owner=run.owner, device=device)["stored"], file)
        states.append(state)
    steps = settings.inner_steps or config.eval_inner_steps or config.inner_steps
    protocol = _protocol(config, packed, settings, steps)
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    folder = run.path / "eval" / f"{settings.split}-{digest}"
    folder.mkdir(
        parents=True, exist_ok=True
    )  # before the work, so that a folder that cannot be written loses none
    scores = evaluate(
        derivatives_of(net, states[0].slow["linear.bias"], config.engine),
        states,
        stream,
        tasks=settings.tasks,
        inner_steps=steps,
        statistics=Statistics(config.bn),
        on_progress=lambda done: on_event(Progress("testing", done, settings.tasks)),
    )
    rows = _rows(config, settings, scores, states, epochs, steps)
    seconds = time.monotonic() - started
    document = {"format": 1, "results": [asdict(row) for row in rows], "protocol": protocol}
    write_json(folder / "summary.json", document | {"device": device_words(device), "seconds": seconds})
    _write_tasks(folder / "tasks.csv", rows, scores)
    return EvalResult(str(run.path), config.dataset, config.algo, str(folder), seconds, tuple(rows))


def _judged(trained: TrainConfig, settings: EvalConfig) -> TrainConfig:
    """The run's settings, with those that only evaluation reads replaced."""
    given = {name: getattr(settings, name) for name in ("queries", "eval_seed", "bn", "data_root", "device")}
    return replace(trained, **{name: value for name, value in given.items() if value is not None})


def _checkpoint_files(run: RunFolder, on_event: OnEvent) -> tuple[list[Path], list[int]]:
    """The best checkpoints, best first, and their epochs; before any validation, the last one."""
    last = run.checkpoints / "last.pt"
    content = checkpoints.load(last, owner=run.owner)
    if "position" not in content:
        raise checkpoints.damaged(last, "does not tell which epochs were best")
    top = content["position"]["top"]
    if not top:
        on_event(Notice(f"{run.path} has not been validated yet: its last checkpoint is judged"))
        return [last], []
    epochs = [int(entry[0]) for entry in top]
    return [epoch_file(run, epoch) for epoch in epochs], epochs


def _protocol(config: TrainConfig, packed: PackedImages, settings: EvalConfig, steps: int) -> dict[str, Any]:
    """All that decides the tasks and how models are judged on them; runs that agree here can be compared."""
    names = ("dataset", "split_scheme", "split_seed", "ink", "ways", "shots", "queries", "eval_seed", "bn")
    protocol: dict[str, Any] = {name: getattr(config, name) for name in names}
    return protocol | {
        "dataset_digest": packed.digest,
        "split": settings.split,
        "tasks": settings.tasks,
        "inner_steps": steps,
    }


def _rows(
    config: TrainConfig,
    settings: EvalConfig,
    scores: Scores,
    states: Sequence[MetaState],
    epochs: Sequence[int],
    steps: int,
) -> list[EvalRow]:
    common: Mapping[str, Any] = {
        "tasks": settings.tasks,
        "split": settings.split,
        "ways": config.ways,
        "shots": config.shots,
        "queries": config.queries,
        "inner_steps": steps,
        "bn": config.bn,
    }
    models = [("best" if epochs else "last", scores.single[0], tuple(epochs[:1]))]
    if epochs:
        models.append((f"ensemble-{len(states)}", scores.ensemble, tuple(epochs)))
    rows = []
    for model, right, used in models:
        per_step = [mean_ci95(column) for column in right.T]
        rows.append(
            EvalRow(
                model=model,
                accuracy=per_step[-1][0],
                ci95=per_step[-1][1],
                epochs=used,
                per_step=tuple(mean for mean, _ in per_step),
                per_step_ci95=tuple(half for _, half in per_step),
                **common,
            )
        )
    return rows


def _write_tasks(path: Path, rows: Sequence[EvalRow], scores: Scores) -> None:
    """One line a task: its number and each row's accuracy after the last inner step."""
    columns = [scores.single[0][:, -1], scores.ensemble[:, -1]][: len(rows)]
    with replacing(path) as file:
        file.write(("task," + ",".join(row.model for row in rows) + "\n").encode())
        for task, values in enumerate(np.stack(columns, axis=1).tolist()):
            file.write((f"{task}," + ",".join(f"{value:.6f}" for value in values) + "\n").encode())
