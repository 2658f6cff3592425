"""The table of run folders: the scores of all rows on the same tasks, compared with the baseline."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.files import read_text
from mamlctl.core.literals import BatchNormMode, Model
from mamlctl.core.statistics import Difference, difference, holm, mean_ci95, over_seeds
from mamlctl.data.rules import metric_of
from mamlctl.data.sets.registry import has_classes
from mamlctl.experiments.grid.command_lines import train_arguments
from mamlctl.experiments.grid.grid import CELLS, GridCell, common_settings
from mamlctl.experiments.grid.plans import as_unimproved, improved_label
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation, find_evaluation, read_cell
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.report.published import published
from mamlctl.report.table import MODELS, Cell, Published, Row, Score, Table
from mamlctl.run_folder import (
    COMMANDS,
    CONFIG,
    RunFolder,
    identity_settings,
    open_run,
    run_state,
)
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig


@dataclass(frozen=True)
class RunReference:
    """One run of a row: its folder, the command that trains it alone, and why its last job failed."""

    seed: int
    folder: Path
    command: str
    failed: str = ""

    @classmethod
    def of_cell(cls, cell: GridCell, failed: str) -> RunReference:
        """A cell of a grid, whose run may not exist yet."""
        words = ["mamlctl", "train", *train_arguments(cell.config), "--out", f"{CELLS}/{cell.name}"]
        return cls(cell.seed, cell.folder, shlex.join(words), failed)

    @classmethod
    def of_run(cls, run: RunFolder) -> RunReference:
        """A run, with the command line that started it."""
        try:
            command = read_text(run.path / COMMANDS).splitlines()[0]
        except (OSError, IndexError):
            command = shlex.join(["mamlctl", "train", "--config", str(run.path / CONFIG)])
        return cls(run.config.seed, run.path.absolute(), command)


@dataclass(frozen=True)
class RowSpec:
    """A row of the table: its label, its settings (with any seed) and its runs."""

    label: str
    config: TrainConfig
    runs: tuple[RunReference, ...]


OF_ONE_RUN = ("seeds", "executable", "metrics_version")  # facts that are not in a table's environment
Scores = Mapping[int, NDArray[np.float64]]  # the score of every task, by seed


@dataclass(frozen=True)
class _RowRuns:
    """The state of a row's runs, and the evaluations of those that have one."""

    spec: RowSpec
    cells: tuple[Cell, ...]
    evaluations: Mapping[int, StoredEvaluation]  # by seed

    def scores(self, model: Model) -> Scores:
        """The scores of one of MODELS, for the seeds that have it."""
        return {
            seed: evaluation.scores[model]
            for seed, evaluation in self.evaluations.items()
            if model in evaluation.scores
        }


def tabulate(
    name: str,
    rows: Sequence[RowSpec],
    evaluate: EvalConfig,
    *,
    root: Path,
    commands: Sequence[str],
    unfinished: bool = False,
) -> Table:
    """Make the table of these runs, with gaps for runs without an evaluation.

    Args:
        name: the end of the title: a plan, or "compared".
        rows: the rows in order; the first is the baseline.
        evaluate: the settings of the evaluation to use.
        root: the folder to which the names of run folders are relative.
        commands: the command lines that make this table again.
        unfinished: whether to include runs whose training has not ended.

    Raises:
        MamlctlError: a run or an evaluation is damaged.
    """
    filled = [_row_runs(row, evaluate, root, unfinished) for row in rows]
    best, ensemble = (_model_scores(filled, model) for model in MODELS)
    common = common_settings([identity_settings(row.config) for row in rows])
    table_rows = [
        _table_row(runs, rows[0], best[place], ensemble[place], evaluate, common)
        for place, runs in enumerate(filled)
    ]
    first = evaluate.over(fill_defaults(rows[0].config))
    # A table of regression tasks has fewer different ones than are drawn.
    different = [evaluation.tasks for runs in filled for evaluation in runs.evaluations.values()]
    return Table(
        title=f"{formatting.task(first.dataset, first.ways, first.shots)}, {name}",
        dataset=first.dataset,
        ways=first.ways,
        shots=first.shots,
        queries=first.queries,
        metric=metric_of(first),
        split=evaluate.split,
        tasks=min(different, default=evaluate.tasks),
        eval_seed=first.eval_seed,
        disjoint=evaluate.disjoint,
        label_permutations=evaluate.label_permutations,
        baseline=rows[0].label,
        rows=tuple(table_rows),
        settings=common,
        environment=_environment(filled, root),
        commands=tuple(commands),
        notes=tuple(_table_notes(filled, table_rows)),
    )


def _row_runs(row: RowSpec, evaluate: EvalConfig, root: Path, unfinished: bool) -> _RowRuns:
    cells, evaluations = [], {}
    for reference in row.runs:
        run = open_run(reference.folder) if (reference.folder / CONFIG).is_file() else None
        cell = read_cell(
            run,
            seed=reference.seed,
            place=os.path.relpath(reference.folder, root),
            command=reference.command,
            failed=reference.failed,
        )
        cells.append(cell)
        if run is None:
            continue
        counts = run_state(run.path).status == "finished" or (unfinished and cell.status != "diverged")
        evaluation = find_evaluation(run, evaluate) if counts else None
        if evaluation is not None:
            evaluations[reference.seed] = evaluation
    return _RowRuns(row, tuple(cells), evaluations)


def _model_scores(rows: Sequence[_RowRuns], model: Model) -> list[Score | None]:
    """The score of each row for one model, with its difference from the first row."""
    baseline = rows[0].scores(model)
    scores = [_score(row, model) for row in rows]
    differences = [None, *(_paired_difference(row.scores(model), baseline) for row in rows[1:])]
    most_seeds = max((len(score.per_seed) for score in scores if score is not None), default=0)
    # With one seed, p covers only the choice of tasks: too certain next to rows with more seeds.
    corrected = holm(
        [each.p if each is not None and (each.seeds > 1 or most_seeds == 1) else None for each in differences]
    )
    return [
        None if score is None else replace(score, difference=each, p_holm=p)
        for score, each, p in zip(scores, differences, corrected, strict=True)
    ]


def _score(row: _RowRuns, model: Model) -> Score | None:
    by_seed = row.scores(model)
    if not by_seed:
        return None
    scores_ST = np.stack(list(by_seed.values()))
    per_seed = tuple(scores_ST.mean(1).tolist())
    mean, ci95 = mean_ci95(scores_ST.mean(0))
    evaluations = [row.evaluations[seed] for seed in by_seed]
    curve_tasks = min(evaluation.per_step_tasks for evaluation in evaluations)
    curve = np.mean([evaluation.per_step[model] for evaluation in evaluations], axis=0) if curve_tasks else []
    return Score(
        mean=mean,
        ci95=ci95,
        deviation=over_seeds(per_seed)[1],
        per_seed=per_seed,
        per_step=tuple(map(float, curve)),
        per_step_tasks=curve_tasks,
        difference=None,
        p_holm=None,
    )


def _paired_difference(row: Scores, baseline: Scores) -> Difference | None:
    """The difference on the seeds that both have; None if there are none."""
    shared = [seed for seed in row if seed in baseline]
    if not shared:
        return None
    row_ST, baseline_ST = (np.stack([scores[seed] for seed in shared]) for scores in (row, baseline))
    return difference(row_ST, baseline_ST)


def _table_row(
    runs: _RowRuns,
    baseline: RowSpec,
    best: Score | None,
    ensemble: Score | None,
    evaluate: EvalConfig,
    common: Mapping[str, Any],
) -> Row:
    config = fill_defaults(runs.spec.config)
    evaluations = list(runs.evaluations.values())
    evaluated = evaluate.over(config)
    bn: BatchNormMode = evaluated.bn if has_classes(config) else "none"
    if evaluations:
        bn = evaluations[0].protocol["bn"]
    settings = identity_settings(runs.spec.config)
    added, removed = _changes(runs.spec, baseline)
    return Row(
        label=runs.spec.label,
        added=added,
        removed=removed,
        settings={key: value for key, value in settings.items() if key not in common},
        cells=runs.cells,
        best=best,
        ensemble=ensemble,
        ensemble_size=min((evaluation.ensemble_size for evaluation in evaluations), default=0),
        published=_published_scores(config, evaluate, evaluated.evaluation_inner_steps, bn),
        bn=bn,
        inner_steps=evaluated.evaluation_inner_steps,
    )


def _changes(row: RowSpec, baseline: RowSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The improvements added to and removed from the baseline, if they are all that the row's label says."""
    row_names, baseline_names = row.config.improvements, baseline.config.improvements
    added = tuple(name for name in row_names if name not in baseline_names)
    removed = tuple(name for name in baseline_names if name not in row_names)
    return (added, removed) if row.label == improved_label(baseline.label, added, removed) else ((), ())


def _published_scores(
    config: TrainConfig, evaluate: EvalConfig, inner_steps: int, bn: BatchNormMode
) -> tuple[Published, ...]:
    """The numbers in papers for such a run; none if its network, order or split differs from theirs."""
    usual = resolve_settings(
        [("flag", {"algo": config.algo, "dataset": config.dataset, "shots": config.shots})], checked=False
    ).config
    same = all(getattr(config, name) == getattr(usual, name) for name in ("net", "first_order", "adapts"))
    same &= evaluate.ways in (None, config.ways) and evaluate.shots in (None, config.shots)
    if not same or evaluate.split != "test":
        return ()
    problem, algo = (config.dataset, config.ways, config.shots), as_unimproved(config).algo
    return published(*problem, algo, config.improvements, inner_steps=inner_steps, bn=bn)


def _environment(rows: Sequence[_RowRuns], root: Path) -> dict[str, Any]:
    """The environment of the first run that has one, without what says nothing about the others."""
    for row in rows:
        for cell in row.cells:
            path = Path(os.path.normpath(root / cell.run))  # the folder `root` may not exist yet
            stored = RunFolder(path, row.spec.config).environment() if (path / CONFIG).is_file() else {}
            if stored:
                return {key: value for key, value in stored.items() if key not in OF_ONE_RUN}
    return {}


def _table_notes(runs: Sequence[_RowRuns], rows: Sequence[Row]) -> list[str]:
    """Caveats about the numbers."""
    notes = [note for row in runs for evaluation in row.evaluations.values() for note in evaluation.notes]
    notes += _equal_rows(runs)
    if len({row.bn for row in rows}) > 1:
        notes.append("rows differ in batch-norm mode: see the column bn")
    if len({row.inner_steps for row in rows}) > 1:
        notes.append("rows differ in inner steps in the test: see the column inner steps")
    devices = {cell.device for row in rows for cell in row.cells if cell.device}
    if len(devices) > 1:
        notes.append(f"trained on different devices ({', '.join(sorted(devices))}): do not compare times")
    return list(dict.fromkeys(notes))


def _equal_rows(rows: Sequence[_RowRuns]) -> list[str]:
    """Notes about rows whose scores are equal on every task, so that their settings make no difference."""
    groups: list[list[_RowRuns]] = []
    for row in rows:
        for group in groups:
            if _are_equal(group[0].scores("best"), row.scores("best")):
                group.append(row)
                break
        else:
            groups.append([row])
    notes = [
        f"equal on every task: {', '.join(row.spec.label for row in group)}" for group in groups if group[1:]
    ]
    for name, bn in ((name, entry.read_by_bn) for name, entry in IMPROVEMENTS.items()):
        if bn and any(_differ_only_in(name, group) for group in groups):
            notes.append(f"{name} keeps statistics that only --bn {bn} uses, so alone it has no effect here")
    return notes


def _are_equal(one: Scores, other: Scores) -> bool:
    if not one or one.keys() != other.keys():
        return False
    return all(bool(np.array_equal(one[seed], other[seed])) for seed in one)


def _differ_only_in(improvement: str, group: Sequence[_RowRuns]) -> bool:
    """Whether two of these rows differ only in this improvement."""
    configs = [{**vars(row.spec.config), improvement: False} for row in group]
    return any(config in configs[:place] for place, config in enumerate(configs))
