"""Comparison of trained runs on the same test tasks (`compare`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mamlctl.core.errors import DataError, MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.metrics_rows import steps_done
from mamlctl.core.problems import Problem, flag
from mamlctl.core.user_code.kinds import check_trusted, code_digests, named_code
from mamlctl.core.user_code.references import names_tasks
from mamlctl.engine.training.starting_weights import stored_start
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.build_table import RowSpec, RunReference, tabulate
from mamlctl.experiments.grid.grid import is_grid
from mamlctl.experiments.grid.grid_folder import load_grid
from mamlctl.experiments.grid.plans import OF_TASKS, label_of
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.settings import fill_defaults
from mamlctl.experiments.training_images import same_training_images
from mamlctl.report.table import Table
from mamlctl.run_folder import RunFolder, identity_settings, open_run, run_state
from mamlctl.settings.evaluation import EvalConfig

# Settings of the runs that an evaluation can replace, so that runs may differ in them.
SHARED_BY_EVALUATION = ("ways", "shots", "queries", "eval_seed")


@dataclass(frozen=True)
class _Run:
    """A run to compare, and its label in the plan of its grid ("" without a grid)."""

    folder: RunFolder
    label: str

    @cached_property
    def identity(self) -> tuple[str, Mapping[str, Any]]:
        """Equal for runs that differ only in their seed."""
        code = {f"{name} code": digest for name, digest in code_digests(self.folder.path).items()}
        digest = stored_start(self.folder.path).get("digest")
        init = {} if digest is None else {"init digest": digest[:12]}
        return self.label, identity_settings(self.folder.config) | code | init


def compare(
    paths: Sequence[Path],
    evaluate: EvalConfig,
    *,
    offline: bool,
    command: str,
    on_event: OnEvent,
    folder: Path | None = None,
) -> Table:
    """Test the runs that have not been tested on these tasks, and make the table.

    Args:
        paths: run folders, or folders of grids for all their runs. Runs that differ only in their seed
            share a row. The first row is the baseline.
        evaluate: the settings of the evaluation.
        offline: never download.
        command: the command line, for the table.
        on_event: receives progress and notices.
        folder: where the table is written, to which its names of run folders are relative; None: the
            current folder.

    Raises:
        SettingsError: the runs cannot be compared.
        DataError, MamlctlError: as `evaluate_run` does.
    """
    runs = [run for path in paths for run in _runs(path)]
    if problems := _incomparable(runs, evaluate):
        raise SettingsError(problems)
    rows = _row_specs(runs)
    untested = [run.folder for run in runs if not _is_tested(run.folder, evaluate)]
    for run in untested:  # before the first test, which may take long
        check_trusted(run.path, named_code(vars(run.config)))
    for run in untested:
        _test(run, evaluate, offline, on_event)
    on_event(Waiting("making the table"))
    root = folder or Path.cwd()
    table = tabulate("compared", rows, evaluate, root=root, commands=[command], unfinished=True)
    notes = [
        f"{run.path.name} stopped at meta-step {steps_done(run.state().step, run.metrics())} "
        f"of {run.config.total_steps}"
        for run in (run.folder for run in runs)
        if not run.state().ended
    ]
    return replace(table, notes=(*notes, *table.notes))


def _is_tested(run: RunFolder, evaluate: EvalConfig) -> bool:
    """Whether a run has been tested, or cannot be tested because it has diverged."""
    return run.state().status == "diverged" or find_evaluation(run, evaluate) is not None


def _test(run: RunFolder, evaluate: EvalConfig, offline: bool, on_event: OnEvent) -> None:
    """Test a run. Raises DataError if its images have changed."""
    on_event(Notice(f"testing {run.path}"))
    evaluate_run(run.path, evaluate, offline=offline, on_event=on_event)
    if find_evaluation(run, evaluate) is None:
        fact = f"{run.path} was trained on images that differ from those of {run.config.dataset} now"
        raise DataError(fact, hint="use the --data-root with which it was trained")


def _runs(path: Path) -> list[_Run]:
    """The run in a folder, or all ended runs of a grid. Raises MamlctlError if there are none."""
    if not is_grid(path):
        return [_Run(open_run(path), "")]
    ended = [cell for cell in load_grid(path).cells if run_state(cell.folder).ended]
    if not ended:
        raise MamlctlError(f"{path} has no finished runs yet", hint=f"run mamlctl ablate --resume {path}")
    # Cells are in the order of training; sort them by row.
    labels = list(dict.fromkeys(cell.row.label for cell in ended))
    ended.sort(key=lambda cell: labels.index(cell.row.label))
    return [_Run(open_run(cell.folder), cell.row.label) for cell in ended]


def _incomparable(runs: Sequence[_Run], evaluate: EvalConfig) -> list[Problem]:
    """Why the runs cannot be tested on the same tasks, as (fact, hint) pairs."""
    first, *others = [run.folder for run in runs]
    paths = [run.folder.path.resolve() for run in runs]
    repeated = {path for path in paths if paths.count(path) > 1}
    problems = [(f"{path} is named twice", "name each run once") for path in sorted(repeated)]
    for run in others:
        same_data = run.trained_on(first.dataset_digest, first.older_digests)
        own_tasks = names_tasks(first.config.dataset) and names_tasks(run.config.dataset)
        for name in OF_TASKS:
            shared = name in SHARED_BY_EVALUATION
            if name == "strict" or (shared and getattr(evaluate, name) is not None):
                continue
            ours, theirs = (getattr(fill_defaults(folder.config), name) for folder in (first, run))
            is_copy = name == "dataset" and own_tasks and same_data  # of the same code
            if ours != theirs and not is_copy:
                way = f"compare them separately, or add {flag(name)}" if shared else "compare them separately"
                has = f"no {flag(name)}" if theirs is None else f"{flag(name)} {theirs}"
                other = "none" if ours is None else ours
                problems.append((f"{run.path} has {has}, but {first.path} has {other}", way))
                if name == "dataset":
                    break  # most other differences follow from it
        if first.config.dataset == run.config.dataset and not same_data:
            theirs, ours = run.dataset_digest, first.dataset_digest
            fact = f"{run.path} was trained on data {theirs:.12}, but {first.path} on {ours:.12}"
            way = f"train both on the same {'tasks' if own_tasks else 'images'}"
            if same_training_images(run, first):
                fact = f"{run.path} was trained on the images of {first.path}, but in another order"
                way = "train both with the same --data-root: a seed draws other tasks from another order"
            problems.append((fact, way))
    return problems


def _row_specs(runs: Sequence[_Run]) -> list[RowSpec]:
    """One row for runs that differ only in their seed; what distinguishes equal labels is added to them."""
    groups: list[list[_Run]] = []
    for run in runs:
        for group in groups:
            seeds = {other.folder.config.seed for other in group}
            if group[0].identity == run.identity and run.folder.config.seed not in seeds:
                group.append(run)
                break
        else:
            groups.append([run])
    firsts = [group[0] for group in groups]
    labels = [first.label or label_of(first.folder.config) for first in firsts]
    rows = []
    for first, label, group in zip(firsts, labels, groups, strict=True):
        rivals = [other for other, same in zip(firsts, labels, strict=True) if same == label]
        if len(rivals) > 1:
            label = f"{label}, {_distinction(first, rivals)}"
        references = tuple(RunReference.of_run(run.folder) for run in group)
        rows.append(RowSpec(label, first.folder.config, references))
    return rows


def _distinction(run: _Run, rivals: Sequence[_Run]) -> str:
    """The settings in which runs with the same label differ; the run's folder if they are equal."""
    _, ours = run.identity
    keys = [key for key in ours if any(rival.identity[1].get(key) != ours[key] for rival in rivals)]
    words = [f"{key}={_shown(ours[key], [rival.identity[1].get(key) for rival in rivals])}" for key in keys]
    return ", ".join(words) or str(run.folder.path)


def _shown(value: object, others: Sequence[object]) -> object:
    """A setting; of a path only the name, unless another run has a path of the same name."""
    path = Path(str(value))
    alike = {str(other) for other in others if Path(str(other)).name == path.name}
    return path.name if path.is_absolute() and alike <= {str(value)} else value
