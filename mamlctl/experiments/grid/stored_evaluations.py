"""What a table reads from run folders: the course of training, and the score of each test task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.files import is_locked
from mamlctl.core.literals import HIGHER_IS_BETTER, CellStatus, Metric, Model, Models
from mamlctl.core.metrics_rows import rows_of, steps_done
from mamlctl.data.rules import metric_of, per_step_settings
from mamlctl.data.sets.registry import has_classes
from mamlctl.experiments.grid.evaluation_files import per_step_tasks, read_scores, read_summary
from mamlctl.report.table import Cell
from mamlctl.run_folder import (
    EVALUATIONS,
    OF_RUN,
    SUMMARY,
    RunFolder,
    protocol_settings,
)
from mamlctl.settings.evaluation import EvalConfig

# Settings that decide what an evaluation contains, but not its scores.
OF_CONTENT = ("models", "per_step", "per_step_tasks")

NEAR = 0.99  # share of the last validation's score that counts as reaching it


@dataclass(frozen=True)
class StoredEvaluation:
    """A stored evaluation of one run."""

    protocol: Mapping[str, Any]
    scores: Mapping[Model, NDArray[np.float64]]  # for every task
    per_step: Mapping[Model, Sequence[float]]  # means after 0, 1, ..., I inner steps, or empty
    per_step_tasks: int  # the number of tasks, the first ones, behind `per_step`
    ensemble_size: int
    notes: tuple[str, ...]
    folder: Path
    seconds: float | None = None  # that it took; None if they are not stored

    @property
    def tasks(self) -> int:
        """The number of different tasks."""
        return next(len(scores) for scores in self.scores.values())


def find_evaluation(run: RunFolder, settings: EvalConfig) -> StoredEvaluation | None:
    """The evaluation of the run's current checkpoint with these settings; None if there is none yet.

    It may contain more than they ask for: other models, or scores after every inner step. The one with the
    fewest of those is returned. Raises MamlctlError if one is damaged.
    """
    settings = replace(settings, checkpoint=run.checkpoint_name(settings.checkpoint))
    settings = per_step_settings(settings, run.config)
    evaluated, left_out = settings.over(run.config), (*OF_RUN, *OF_CONTENT)
    required = {
        name: value for name, value in protocol_settings(settings, evaluated).items() if name not in left_out
    }
    sizes = {"ways": evaluated.ways, "shots": evaluated.shots}
    if not has_classes(run.config) and settings.ways is None:
        sizes["ways"] = 1
    answers = list[tuple[int, Path, dict[str, Any]]]()
    for path in sorted((run.path / EVALUATIONS).glob(f"{settings.split}-*/{SUMMARY}")):
        summary = read_summary(path)
        protocol = {key: value for key, value in summary["protocol"].items() if key not in left_out}
        digest = protocol.pop("dataset_digest", None)
        protocol.pop("table", None)  # follows from the settings and the data
        # Evaluations of an earlier checkpoint or of other images do not count.
        same = protocol in (required, required | {"bn": "none"}) and run.trained_on(digest)
        same &= all(summary["protocol"].get(name) == value for name, value in sizes.items())
        same &= summary.get("owner", run.owner) == run.owner  # otherwise config.yaml is damaged
        if same and summary.get("step") == run.state().step and _contains(summary, settings):
            answers.append((per_step_tasks(summary), path.parent, summary))
    if not answers:
        return None
    _, folder, summary = min(answers, key=lambda answer: answer[0])
    return _load_evaluation(folder, summary, settings.models)


def _contains(summary: Mapping[str, Any], settings: EvalConfig) -> bool:
    """Whether an evaluation has the models and the scores per inner step that the settings ask for."""
    kinds = {row["kind"] for row in summary["results"]}
    has_models = summary["protocol"].get("models", "all") == "all" or settings.models in kinds
    return has_models and per_step_tasks(summary) >= settings.curve_tasks


def _load_evaluation(folder: Path, summary: Mapping[str, Any], models: Models) -> StoredEvaluation:
    scores = read_scores(folder, summary)
    results = [row for row in summary["results"] if models in ("all", row["kind"])]
    of_models: dict[Model, NDArray[np.float64]] = {row["kind"]: scores[row["model"]] for row in results}
    return StoredEvaluation(
        summary["protocol"],
        of_models,
        # null stands for a number that was not finite.
        {
            row["kind"]: [math.nan if value is None else float(value) for value in row["per_step"]]
            for row in results
        },
        min(per_step_tasks(summary), *map(len, of_models.values())),
        max(len(row["epochs"]) for row in results),
        tuple(summary.get("notes") or ()),
        folder,
        seconds if isinstance(seconds := summary.get("seconds"), float) and math.isfinite(seconds) else None,
    )


def read_cell(run: RunFolder | None, *, seed: int, place: str, command: str, failed: str = "") -> Cell:
    """The course of a run's training.

    Args:
        run: the run; None if it does not exist yet.
        seed: the seed of the run.
        place: the run folder, as the table names it.
        command: the command line that trains this run alone.
        failed: why its last job failed; "" if it did not.
    """
    if run is None:
        return Cell(seed, place, "failed" if failed else "missing", failed, 0, None, None, (), {}, command)
    state, metrics = run.state(), run.metrics()
    reports = rows_of(metrics, "report")
    metric = metric_of(run.config)
    scores = [(int(row["step"]), row.get(f"val_{metric}")) for row in rows_of(metrics, "validation")]
    # null stands for a number that was not finite.
    validation = tuple((step, math.nan if score is None else float(score)) for step, score in scores)
    status: CellStatus = state.status or "running"
    if failed and status != "diverged":
        status = "failed"
    elif status == "running" and not is_locked(run.path):
        status = "interrupted"  # killed before it could write its status
    # The first report includes the warm-up.
    step_seconds = [run.config.meta_batch_size / row["tasks_per_second"] for row in reports[1:] or reports]
    return Cell(
        seed=seed,
        run=place,
        status=status,
        reason=failed if status == "failed" else state.reason,
        steps=steps_done(state.step, metrics),
        steps_to_99=_steps_to_99(validation, metric) if state.status == "finished" else None,
        step_s=statistics.median(step_seconds) if step_seconds else None,
        validation=validation,
        rates=next((row["rates"] for row in reversed(reports) if row.get("rates")), {}),
        command=command,
        device=str(run.environment().get("device") or ""),
        diverged_at=state.diverged_at,
    )


def _steps_to_99(validation: Sequence[tuple[int, float]], metric: Metric) -> int | None:
    """The first step with a score of at least 99 % of the last one (mse: at most 1/0.99 of it).

    Returns are negative, and compare by their absolute values, as errors do.
    """
    for step, score in validation:
        last = validation[-1][1]
        near = last / NEAR if metric == "mse" or last < 0 else last * NEAR
        if score >= near if metric in HIGHER_IS_BETTER else score <= near:
            return step
    return None
