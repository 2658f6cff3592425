"""Evaluation of a trained run on a fixed list of tasks (`eval`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from mamlctl.core import formatting
from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.literals import Model
from mamlctl.core.results import EvalResult, EvalRow, LossMeans, TableScores, TargetError, named
from mamlctl.core.statistics import mean_ci95
from mamlctl.data.rules import per_step_settings
from mamlctl.data.tasks.label_permutations import LabelPermutations
from mamlctl.data.tasks.table_tasks import different_tasks
from mamlctl.engine.devices import device_words
from mamlctl.engine.distributed import current
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, ModelScores, Scores, evaluate
from mamlctl.engine.kernels.c_library import compiled_at_every_start
from mamlctl.experiments.grid.evaluation_files import write_evaluation
from mamlctl.experiments.processes.together import EvaluationJob, send_after
from mamlctl.experiments.trained_model import TrainedModel, load_trained_model
from mamlctl.run_folder import EVALUATIONS, OF_RUN, open_run, protocol_settings
from mamlctl.settings.evaluation import EvalConfig


def evaluate_run(path: Path, settings: EvalConfig, *, offline: bool, on_event: OnEvent) -> EvalResult:
    """Evaluate a run's best checkpoint, the ensemble of its best ones, or both; write eval/<split>-<digest>/.

    Args:
        path: the run folder.
        settings: the settings of the evaluation.
        offline: never download.
        on_event: receives progress and notices.

    Raises:
        SettingsError, DataError, MamlctlError: as `load_trained_model` does.
    """
    started = time.monotonic()
    if problems := current().device_problems(settings.device):
        raise SettingsError(problems)
    with send_after(EvaluationJob(path.absolute(), settings, offline), on_event) as show:
        model, settings = prepared(path, settings, offline=offline, on_event=show)
    if reason := compiled_at_every_start():
        on_event(Notice(reason))
    # Everything that decides the tasks and the evaluation; runs with the same protocol can be compared.
    protocol = {name: getattr(model.config, name) for name in OF_RUN}
    protocol |= protocol_settings(settings, model.config)
    source, trained = model.source, model.run.dataset_digest
    # Under the digest that the run knows, so that its evaluation is found again.
    tested = trained if trained in source.older_digests else source.digest
    protocol |= {"bn": model.bn, "dataset_digest": tested}
    if source.table is not None:
        columns = source.table.standardisation
        protocol["table"] = {
            "tasks": different_tasks(model.stream, settings.tasks),
            "inputs": columns.inputs,
            "targets": columns.targets,
            "split_fractions": model.config.split_fractions,
        }
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    folder = model.run.path / EVALUATIONS / f"{settings.split}-{digest}"
    # Created before the evaluation, so that no work is lost if the folder cannot be written.
    folder.mkdir(parents=True, exist_ok=True)
    scores = scores_of(model, settings, on_event)
    rows, by_model = _eval_rows(model, settings, scores)
    table = _table_scores(model, by_model)
    seconds = time.monotonic() - started
    summary = {
        "format": 1,
        "results": [named(row) for row in rows],
        "protocol": protocol,
        "notes": model.notes,
        "step": model.run.state().step,
        "owner": model.run.owner,
        "device": device_words(model.device),
        "seconds": seconds,
    }
    if table is not None:
        summary["table"] = asdict(table)
    loss = _loss_means(model, by_model)
    if loss is not None:
        summary["loss"] = asdict(loss)
    write_evaluation(folder, summary, {name: scores.last_T for name, scores in by_model.items()})
    return EvalResult(
        run=str(model.run.path),
        dataset=model.config.dataset,
        algo=model.config.algo,
        folder=str(folder),
        seconds=seconds,
        rows=tuple(rows),
        notes=model.notes,
        table=table,
        loss=loss,
    )


def _loss_means(model: TrainedModel, by_model: Mapping[str, ModelScores]) -> LossMeans | None:
    """The mean loss of each model; None for the default loss."""
    losses = {name: scores.loss_T for name, scores in by_model.items()}
    means = {name: mean_ci95(loss_T) for name, loss_T in losses.items() if loss_T is not None}
    return LossMeans(formatting.loss_name(str(model.config.loss)), means) if means else None


def prepared(
    path: Path, settings: EvalConfig, *, offline: bool, on_event: OnEvent
) -> tuple[TrainedModel, EvalConfig]:
    """Open a run, and complete the settings of its evaluation; arguments as in `evaluate_run`."""
    settings = per_step_settings(settings, open_run(path).config)
    model = load_trained_model(path, settings, offline=offline, on_event=on_event)
    # Each file has one spelling, so that it is not evaluated twice.
    return model, replace(settings, checkpoint=model.run.checkpoint_name(settings.checkpoint))


def _table_scores(model: TrainedModel, by_model: Mapping[str, ModelScores]) -> TableScores | None:
    """The errors of each target in its own unit, for a run on a table."""
    facts = model.source.table
    if facts is None:
        return None
    errors: dict[str, tuple[TargetError, ...]] = {}
    for name, scores in by_model.items():
        assert scores.targets_TN is not None
        pairs = zip(facts.standardisation.targets, scores.targets_TN.T, strict=True)
        errors[name] = tuple(TargetError(target, *mean_ci95(errors_T)) for target, errors_T in pairs)
    tasks = next(len(scores.last_T) for scores in by_model.values())
    return TableScores(tasks, errors)


def scores_of(model: TrainedModel, settings: EvalConfig, on_event: OnEvent) -> Scores:
    """Score every task, and average over the orders of its labels; all ranks share the tasks.

    Args:
        model: the run.
        settings: of the evaluation.
        on_event: receives progress.
    """
    orders = settings.label_permutations
    scores = evaluate(
        model.derivatives,
        model.states,
        model.stream if orders == 1 else LabelPermutations(model.stream, orders),
        EvaluationPlan(
            tasks=settings.tasks * orders,
            inner_steps=model.inner_steps,
            statistics=model.statistics,
            predict=model.predict,
            curve_tasks=settings.curve_tasks * orders,
        ),
        on_progress=lambda done: on_event(Progress("testing", done // orders, settings.tasks)),
        ranks=current(),
    )
    if orders == 1:
        return scores
    *single, ensemble = (
        ModelScores(
            part.last_T.reshape(settings.tasks, orders).mean(1),
            part.curve_TI.reshape(len(part.curve_TI) // orders, orders, part.curve_TI.shape[1]).mean(1),
            loss_T=None if part.loss_T is None else part.loss_T.reshape(settings.tasks, orders).mean(1),
        )
        for part in (*scores.single, scores.ensemble)
    )
    return Scores(single, ensemble)


def _eval_rows(
    model: TrainedModel, settings: EvalConfig, scores: Scores
) -> tuple[list[EvalRow], dict[str, ModelScores]]:
    """A row for the best checkpoint, and one for the ensemble if there was a validation.

    Returns:
        The rows that the settings ask for, and the scores of all tasks by model.
    """
    config, epochs = model.config, tuple(model.epochs)
    models: list[tuple[str, Model, ModelScores, tuple[int, ...]]]
    models = [("best" if epochs else "last", "best", scores.single[0], epochs[:1])]
    if epochs:
        models.append((f"ensemble-{len(model.states)}", "ensemble", scores.ensemble, epochs))
    rows, by_model = [], {}
    for name, kind, of_model, epochs_used in models:
        if settings.models not in ("all", kind):
            continue
        by_model[name] = of_model
        score, ci95 = mean_ci95(of_model.last_T)
        curve = [mean_ci95(scores_T) for scores_T in of_model.curve_TI.T]
        row = EvalRow(
            model=name,
            kind=kind,
            metric=model.derivatives.net.objective.metric,
            score=score,
            ci95=ci95,
            tasks=settings.tasks,
            split=settings.split,
            ways=config.ways,
            shots=config.shots,
            queries=config.queries,
            inner_steps=model.inner_steps,
            bn=model.bn,
            epochs=epochs_used,
            per_step=tuple(mean for mean, _ in curve),
            per_step_ci95=tuple(half for _, half in curve),
            # From a table, of draws as `tasks`, although these scores are means over the draws of each task.
            per_step_tasks=settings.curve_tasks,
        )
        rows.append(row)
    return rows, by_model
