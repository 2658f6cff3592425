"""The time that a grid still needs, from the times of its other cells, of this call and of earlier ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mamlctl.core.events import OVER, CellState
from mamlctl.core.metrics_rows import rows_of
from mamlctl.core.results import KEPT
from mamlctl.data.rules import per_step_settings
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation
from mamlctl.run_folder import COMMANDS, CONFIG, STATUS, SUMMARY, RunFolder
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

LONGEST_START_S = 60.0  # a test that started later after its training belongs to another call


@dataclass(frozen=True)
class CellTime:
    """What a cell costs, in seconds."""

    step_s: float  # per meta-step; of a finished cell, with its validations
    test_s: float | None = None  # with the start of both processes; None: it is not finished
    earlier: bool = False  # finished before this call
    expected_test_s: float = 0.0  # of a test, while no cell is finished


def running_time(run: RunFolder, metrics: Sequence[dict[str, Any]], test: EvalConfig) -> CellTime | None:
    """What a cell that is not finished costs; None without reports.

    Args:
        run: its run folder.
        metrics: the last rows of its metrics.jsonl.
        test: the settings of its test.
    """
    step_s = step_time(run, metrics)
    if step_s is None:
        return None
    # A test task is taken to cost what a training task costs; measured, it costs 0.2 to 3 times as much on
    # images: there is no meta-gradient, but there may be more inner steps and queries.
    tasks = test.tasks * times_tested(run.config, test)
    return CellTime(step_s, expected_test_s=step_s / run.config.meta_batch_size * tasks)


def times_tested(config: TrainConfig, test: EvalConfig) -> int:
    """How often a test predicts each task: for every order of its labels, by every checkpoint."""
    test = per_step_settings(test, config)
    checkpoints = 1 if test.models == "best" else min(config.epochs, KEPT)
    return test.label_permutations * checkpoints


def step_time(run: RunFolder, metrics: Sequence[dict[str, Any]]) -> float | None:
    """The median seconds per meta-step in the last reports of a run; None without reports."""
    reports = rows_of(metrics, "report")
    # The first report includes the warm-up.
    speeds = [row["tasks_per_second"] for row in reports[1:] or reports]
    return run.config.meta_batch_size / statistics.median(speeds) if speeds else None


def finished_time(
    run: RunFolder, metrics: Sequence[dict[str, Any]], evaluation: StoredEvaluation
) -> CellTime | None:
    """What a finished cell has cost; None if its reports are missing.

    Args:
        run: its run folder.
        metrics: the last rows of its metrics.jsonl.
        evaluation: its test.
    """
    step_s, test_s = step_time(run, metrics), evaluation.seconds or 0.0
    if step_s is None:
        return None
    with suppress(OSError):
        began, ended = ((run.path / name).stat().st_mtime for name in (CONFIG, STATUS))
        # From the first file of the run to the last one, unless the run was interrupted in between. In a
        # copied folder, all files may be of the same time.
        if len((run.path / COMMANDS).read_text(errors="replace").splitlines()) == 1:
            step_s = max(step_s, (ended - began) / run.config.total_steps)
        # The training starts in the same way as the test.
        start_s = (evaluation.folder / SUMMARY).stat().st_mtime - ended - test_s
        test_s += 2 * start_s if 0 < start_s < LONGEST_START_S else 0.0
    return CellTime(step_s, test_s)


def seconds_left(
    cells: Sequence[CellState], times: Mapping[tuple[str, int], CellTime], workers: int
) -> float | None:
    """Estimate the time until all cells are finished; None if there is nothing to estimate it from.

    A cell is expected to cost what the finished cells of its row have cost, since they differ only in their
    seeds; without those, what it costs itself, and without reports, what finished or else running cells cost.

    Args:
        cells: all cells of the grid.
        times: what cells cost, by row and seed, of the cells for which it is known.
        workers: cells that run at once.
    """
    times = _at_current_speed(times)
    finished = [time for time in times.values() if time.test_s is not None]
    pending = []
    for cell in cells:
        if cell.state in OVER:
            continue
        of_row = [time for (row, _), time in times.items() if row == cell.row and time.test_s is not None]
        own = [times[key] for key in [(cell.row, cell.seed)] if key in times]
        known = of_row or own or finished or list(times.values())
        if not known:
            return None
        step_s = statistics.mean(time.step_s for time in known)
        tests = [time.test_s for time in of_row or finished if time.test_s is not None]
        expected = [time.expected_test_s for time in known]
        test_s = statistics.mean(tests or expected)
        pending.append((cell.total_steps - cell.step) * step_s + test_s)
    return max([sum(pending) / workers, *pending])


def _at_current_speed(times: Mapping[tuple[str, int], CellTime]) -> dict[tuple[str, int], CellTime]:
    """The times, in which cells of earlier calls cost what they would cost now.

    The number of workers and the load of the machine may have changed. By how much is known from the rows in
    which cells have finished both in this call and before.
    """
    step_s, test_s = ({True: 0.0, False: 0.0} for _ in range(2))  # sums over these rows, by `earlier`
    for row in {row for row, _ in times}:
        of_row = [time for (name, _), time in times.items() if name == row and time.test_s is not None]
        if len({time.earlier for time in of_row}) == 2:
            for earlier in (True, False):
                known = [time for time in of_row if time.earlier == earlier]
                step_s[earlier] += statistics.mean(time.step_s for time in known)
                test_s[earlier] += statistics.mean(time.test_s or 0.0 for time in known)
    slower, slower_test = (now[False] / now[True] if now[True] > 0 else 1.0 for now in (step_s, test_s))
    return {
        key: replace(time, step_s=time.step_s * slower, test_s=(time.test_s or 0.0) * slower_test)
        if time.earlier
        else time
        for key, time in times.items()
    }
