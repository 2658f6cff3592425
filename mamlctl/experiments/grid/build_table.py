"""From run folders to a table: every row's scores on the same tasks, and how it differs from the baseline."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlctl.core import formatting
from mamlctl.core.statistics import Difference, difference, holm, mean_ci95, over_seeds
from mamlctl.data.sets.registry import is_curve_family
from mamlctl.experiments.grid.plans import label_of
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation, find_evaluation, read_cell
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.experiments.trained_model import eval_steps
from mamlctl.report.published import published
from mamlctl.report.table import MODELS, Cell, Published, Row, Score, Table
from mamlctl.run_folder import CONFIG, RunFolder, common_settings, identity_settings, open_run, run_state
from mamlctl.settings.schema import EvalConfig, TrainConfig


@dataclass(frozen=True)
class RunReference:
    """One run of a row: where it is, the command that trains it alone, and why its last try failed."""

    seed: int
    folder: Path
    command: str
    failed: str = ""


@dataclass(frozen=True)
class RowSpec:
    """A row to be filled: its label, its settings (with any seed), its runs."""

    label: str
    config: TrainConfig
    sources: tuple[RunReference, ...]


@dataclass(frozen=True)
class _Filled:
    """A row's runs as they are, and the tests of those that have one."""

    wanted: RowSpec
    cells: tuple[Cell, ...]
    tested: Mapping[int, StoredEvaluation]  # by seed


def tabulate(
    name: str,
    rows: Sequence[RowSpec],
    evaluate: EvalConfig,
    *,
    root: Path,
    commands: Sequence[str],
    unfinished: bool = False,
) -> Table:
    """The table of these runs, the first row its baseline; runs without a test leave gaps.

    `root`: the folder that runs are told relative to. `unfinished`: runs count that have not come to their
    end. Raises MamlctlError for a damaged run or test.
    """
    filled = [_filled(row, evaluate, root, unfinished) for row in rows]
    scores = {kind: _scores(filled, kind) for kind in MODELS}
    common = common_settings([identity_settings(row.config) for row in rows])
    found = [
        _row(row, scores["best"][place], scores["ensemble"][place], evaluate, common)
        for place, row in enumerate(filled)
    ]
    first = fill_defaults(rows[0].config)
    queries = evaluate.queries or first.queries
    return Table(
        title=f"{formatting.task(first.dataset, first.ways, first.shots)}, {name}",
        dataset=first.dataset,
        ways=first.ways,
        shots=first.shots,
        queries=queries,
        metric="mse" if is_curve_family(first.dataset) else "accuracy",
        split=evaluate.split,
        tasks=evaluate.tasks,
        eval_seed=first.eval_seed if evaluate.eval_seed is None else evaluate.eval_seed,
        disjoint=evaluate.disjoint,
        label_permutations=evaluate.label_permutations,
        baseline=rows[0].label,
        rows=tuple(found),
        settings=common,
        environment=_environment(filled, root),
        commands=tuple(commands),
        notes=tuple(_notes(filled, found)),
    )


def _filled(row: RowSpec, evaluate: EvalConfig, root: Path, unfinished: bool) -> _Filled:
    cells, tested = [], {}
    for source in row.sources:
        run = open_run(source.folder) if (source.folder / CONFIG).is_file() else None
        place = os.path.relpath(source.folder, root)
        cells.append(
            read_cell(run, seed=source.seed, place=place, command=source.command, failed=source.failed)
        )
        ended = run is not None and run_state(run.path).status == "finished"
        counts = ended or (unfinished and cells[-1].status != "diverged")
        test = find_evaluation(run, evaluate) if run is not None and counts else None
        if test is not None:
            tested[source.seed] = test
    return _Filled(row, tuple(cells), tested)


def _scores(rows: Sequence[_Filled], kind: str) -> list[Score | None]:
    """Every row's score for the best checkpoints or the ensembles, with differences to the first row's."""
    baseline = _by_seed(rows[0], kind)
    found: list[Score | None] = [_score(row, kind) for row in rows]
    differences = [None, *(_difference(_by_seed(row, kind), baseline) for row in rows[1:])]
    most = max((len(score.per_seed) for score in found if score is not None), default=0)
    # Of one seed where there are more, the interval is for other tasks alone: surer than those beside it.
    corrected = holm([each.p if each and (each.seeds > 1 or most == 1) else None for each in differences])
    return [
        score and replace(score, difference=each, p_holm=p)
        for score, each, p in zip(found, differences, corrected, strict=True)
    ]


def _by_seed(row: _Filled, kind: str) -> dict[int, NDArray[np.float64]]:
    return {seed: test.scores[kind] for seed, test in row.tested.items() if kind in test.scores}


def _score(row: _Filled, kind: str) -> Score | None:
    by_seed = _by_seed(row, kind)
    if not by_seed:
        return None
    scores_ST = np.stack(list(by_seed.values()))
    per_seed = tuple(scores_ST.mean(1).tolist())
    mean, ci95 = mean_ci95(scores_ST.mean(0))
    per_step = np.mean([row.tested[seed].per_step[kind] for seed in by_seed], axis=0)
    return Score(mean, ci95, over_seeds(per_seed)[1], per_seed, tuple(per_step.tolist()), None, None)


def _difference(
    ours: Mapping[int, NDArray[np.float64]], theirs: Mapping[int, NDArray[np.float64]]
) -> Difference | None:
    """On the seeds that both have; None without any."""
    if not (both := [seed for seed in ours if seed in theirs]):
        return None
    ours_ST, theirs_ST = (np.stack([scores[seed] for seed in both]) for scores in (ours, theirs))
    return difference(ours_ST, theirs_ST)


def _row(
    row: _Filled,
    best: Score | None,
    ensemble: Score | None,
    evaluate: EvalConfig,
    common: Mapping[str, Any],
) -> Row:
    config = fill_defaults(row.wanted.config)
    tests = list(row.tested.values())
    steps = eval_steps(config) if evaluate.inner_steps is None else evaluate.inner_steps
    without = "none" if is_curve_family(config.dataset) else evaluate.bn or config.bn
    bn = str(tests[0].protocol["bn"]) if tests else without
    return Row(
        label=row.wanted.label,
        settings={
            key: value for key, value in identity_settings(row.wanted.config).items() if key not in common
        },
        cells=row.cells,
        best=best,
        ensemble=ensemble,
        ensemble_size=min((test.ensemble_size for test in tests), default=0),
        published=_published(config, evaluate, steps, bn),
        bn=bn,
        inner_steps=steps,
        steps_to_99=_median(cell.steps_to_99 for cell in row.cells),
        step_s=_median(cell.step_s for cell in row.cells),
    )


def _published(config: TrainConfig, evaluate: EvalConfig, inner_steps: int, bn: str) -> tuple[Published, ...]:
    """What papers print for such a run; nothing for another network, order, split or way to normalise."""
    usual = resolve_settings(
        [("flag", {"algo": config.algo, "dataset": config.dataset, "shots": config.shots})], checked=False
    ).config
    same = all(getattr(config, name) == getattr(usual, name) for name in ("net", "first_order", "adapts"))
    # Papers normalise queries by their own statistics; Reptile's gives both ways.
    if not same or evaluate.split != "test" or (bn in ("running", "support") and config.algo != "reptile"):
        return ()
    label = label_of(config)
    return published(config.dataset, config.ways, config.shots, label, inner_steps=inner_steps, bn=bn)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None


def _environment(rows: Sequence[_Filled], root: Path) -> dict[str, Any]:
    """Of the first run that has one; its own seeds and paths left out."""
    for row in rows:
        for cell in row.cells:
            path = root / cell.run
            if (path / CONFIG).is_file() and (known := RunFolder(path, row.wanted.config).environment()):
                return {key: value for key, value in known.items() if key not in ("seeds", "executable")}
    return {}


def _notes(rows: Sequence[_Filled], found: Sequence[Row]) -> list[str]:
    """What a reader of the numbers must know."""
    notes = [note for row in rows for test in row.tested.values() for note in test.notes]
    notes += _equal_rows(rows)
    if len({row.bn for row in found}) > 1:
        notes.append("rows differ in how queries are normalised: see the column bn")
    if len({row.inner_steps for row in found}) > 1:
        notes.append("rows differ in inner steps of the test: see the column inner steps")
    devices = {cell.device for row in found for cell in row.cells if cell.device}
    if len(devices) > 1:
        notes.append(f"trained on different devices ({', '.join(sorted(devices))}): times do not compare")
    return list(dict.fromkeys(notes))


def _equal_rows(rows: Sequence[_Filled]) -> list[str]:
    """Rows that agree on every task: what sets them apart changes no prediction."""
    groups: list[list[_Filled]] = []
    for row in rows:
        for group in groups:
            if _all_equal(_by_seed(group[0], "best"), _by_seed(row, "best")):
                group.append(row)
                break
        else:
            groups.append([row])
    notes = [
        f"equal on every task: {', '.join(r.wanted.label for r in group)}" for group in groups if group[1:]
    ]
    if any(_bnrs_alone(group) for group in groups):
        notes.append("bnrs keeps statistics that only --bn running reads, so alone it changes nothing here")
    return notes


def _all_equal(mine: Mapping[int, NDArray[np.float64]], theirs: Mapping[int, NDArray[np.float64]]) -> bool:
    if not mine or mine.keys() != theirs.keys():
        return False
    return all(bool(np.array_equal(mine[seed], theirs[seed])) for seed in mine)


def _bnrs_alone(group: Sequence[_Filled]) -> bool:
    """Whether two of these rows differ in nothing but bnrs."""
    plain = [replace(row.wanted.config, bnrs=False) for row in group]
    return any(config in plain[:place] for place, config in enumerate(plain))
