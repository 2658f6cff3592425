"""`compare`: trained runs on the same test tasks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mamlctl.core.errors import DataError, MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.problems import Problem, flag
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.build_table import RowSpec, RunReference, tabulate
from mamlctl.experiments.grid.grid import PLAN
from mamlctl.experiments.grid.grid_folder import load_grid
from mamlctl.experiments.grid.plans import OF_TASKS, label_of
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.settings import fill_defaults
from mamlctl.report.table import Table
from mamlctl.run_folder import CONFIG, RunFolder, identity_settings, open_run, run_state
from mamlctl.settings.schema import EvalConfig

# What an evaluation may set for all runs, so that they may differ in it.
SETTLED = ("queries", "eval_seed")

ENDED = ("finished", "diverged")


@dataclass(frozen=True)
class _Run:
    """A run to compare, and the label that its plan has given it; "" without one."""

    folder: RunFolder
    label: str


def compare(
    paths: Sequence[Path], evaluate: EvalConfig, *, offline: bool, command: str, on_event: OnEvent
) -> Table:
    """Test whichever run lacks these test tasks, and make the table; the first run's row is the baseline.

    `paths`: run folders, or folders of grids for all their runs. Runs that differ in their seed alone are
    one row. Raises SettingsError for runs that cannot be compared, saying why, and what `evaluate_run` does.
    """
    runs = [run for path in paths for run in _runs(path)]
    if problems := _incomparable(runs, evaluate):
        raise SettingsError(problems)
    rows = _rows(runs)
    for run in runs:
        _test(run.folder, evaluate, offline, on_event)
    table = tabulate("compared", rows, evaluate, root=Path.cwd(), commands=[command], unfinished=True)
    notes = [note for run in runs if (note := _unfinished(run.folder))]
    return replace(table, notes=(*notes, *table.notes))


def _test(run: RunFolder, evaluate: EvalConfig, offline: bool, on_event: OnEvent) -> None:
    """Test a run unless it has been, or has diverged. Raises DataError if its images are others by now."""
    if run_state(run.path).status == "diverged" or find_evaluation(run, evaluate) is not None:
        return
    on_event(Notice(f"testing {run.path}"))
    evaluate_run(run.path, evaluate, offline=offline, on_event=on_event)
    if find_evaluation(run, evaluate) is None:
        fact = f"{run.path} was trained on other images than {run.config.dataset} has now"
        raise DataError(fact, hint="compare it with the --data-root that it was trained with")


def _unfinished(run: RunFolder) -> str:
    """How far a run has come that is not at its end; "" of one that is."""
    if run_state(run.path).status in ENDED:
        return ""
    step = max([run_state(run.path).step, *(entry["step"] for entry in run.metrics()[-1:])])
    return f"{run.path.name} stopped at meta-step {step} of {run.config.total_steps}"


def _runs(path: Path) -> list[_Run]:
    """A folder's run, or all runs of a grid that have ended. Raises MamlctlError for neither."""
    if not (path / PLAN).is_file():
        return [_Run(open_run(path), "")]
    ended = [cell for cell in load_grid(path).cells if run_state(cell.folder).status in ENDED]
    found = [_Run(open_run(cell.folder), cell.row.label) for cell in ended]
    if not found:
        raise MamlctlError(f"{path} has no finished runs yet", hint=f"mamlctl ablate --resume {path}")
    # Row by row: cells are in the order in which they are trained.
    labels = list(dict.fromkeys(run.label for run in found))
    return sorted(found, key=lambda run: labels.index(run.label))


def _incomparable(runs: Sequence[_Run], evaluate: EvalConfig) -> list[Problem]:
    """What keeps the runs from being judged on the same tasks: (fact, way out) pairs."""
    first, *others = [run.folder for run in runs]
    paths = [run.folder.path.resolve() for run in runs]
    twice = {path for path in paths if paths.count(path) > 1}
    problems = [(f"{path} is named twice", "name each run once") for path in sorted(twice)]
    for run in others:
        for name in OF_TASKS:
            if name == "strict" or (name in SETTLED and getattr(evaluate, name) is not None):
                continue
            ours, theirs = (getattr(fill_defaults(folder.config), name) for folder in (first, run))
            if ours != theirs:
                way = f"compare them apart, or give {flag(name)}" if name in SETTLED else "compare them apart"
                problems.append((f"{run.path} has {flag(name)} {theirs}, but {first.path} has {ours}", way))
        digests = [folder.environment().get("dataset_digest") for folder in (first, run)]
        if first.config.dataset == run.config.dataset and digests[0] != digests[1]:
            fact = (
                f"{run.path} was trained on data {digests[1]!s:.12}, but {first.path} on {digests[0]!s:.12}"
            )
            problems.append((fact, "train both on the same images"))
    return problems


def _rows(runs: Sequence[_Run]) -> list[RowSpec]:
    """Runs that differ in their seed alone are a row; its label says what sets it apart from the others."""
    groups: list[list[_Run]] = []
    for run in runs:
        for group in groups:
            if _same_but_seed(group[0], run) and run.folder.config.seed not in _seeds(group):
                group.append(run)
                break
        else:
            groups.append([run])
    labels = [group[0].label or label_of(group[0].folder.config) for group in groups]
    labels = [
        label if labels.count(label) == 1 else f"{label}, {_apart(groups, place, labels)}"
        for place, label in enumerate(labels)
    ]
    return [
        RowSpec(label, group[0].folder.config, tuple(_source(run.folder) for run in group))
        for label, group in zip(labels, groups, strict=True)
    ]


def _same_but_seed(one: _Run, other: _Run) -> bool:
    return one.label == other.label and identity_settings(one.folder.config) == identity_settings(
        other.folder.config
    )


def _seeds(group: Sequence[_Run]) -> set[int]:
    return {run.folder.config.seed for run in group}


def _apart(groups: Sequence[Sequence[_Run]], place: int, labels: Sequence[str]) -> str:
    """The settings in which rows of the same label differ; their folders' names where none do."""
    ours = identity_settings(groups[place][0].folder.config)
    rivals = [
        identity_settings(group[0].folder.config)
        for other, group in enumerate(groups)
        if other != place and labels[other] == labels[place]
    ]
    keys = [key for key in ours if any(rival[key] != ours[key] for rival in rivals)]
    if not keys:
        return str(groups[place][0].folder.path)
    return ", ".join(f"{key}={ours[key]}" for key in keys)


def _source(run: RunFolder) -> RunReference:
    try:
        command = (run.path / "command.txt").read_text().splitlines()[0]
    except (OSError, IndexError):
        command = shlex.join(["mamlctl", "train", "--config", str(run.path / CONFIG)])
    return RunReference(run.config.seed, run.path.absolute(), command)
