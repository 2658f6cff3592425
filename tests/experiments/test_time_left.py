"""The time left of a grid: from the cells that have finished, in this call or before."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers.grid_cases import ignore, tiny_grid

from mamlctl.core.events import CellState, GridChanged
from mamlctl.experiments.grid import scheduler
from mamlctl.experiments.grid.scheduler import Scheduler
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation
from mamlctl.experiments.grid.time_left import CellTime, finished_time, running_time, seconds_left, step_time
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.run_folder import COMMANDS, CONFIG, STATUS, SUMMARY, RunState, new_run
from mamlctl.settings.evaluation import EvalConfig


def cells(*states, total=100):
    """Cells of the rows a and b, given as (row, state, step)."""
    return [CellState(row, seed, state, step, total) for seed, (row, state, step) in enumerate(states)]


def test_cells_cost_what_the_finished_cells_of_their_row_have_cost():
    states = cells(("a", "done", 100), ("b", "done", 100), ("a", "waiting", 0), ("b", "training", 40))
    times = {("a", 0): CellTime(1.0, 7.0), ("b", 1): CellTime(3.0, 5.0), ("b", 3): CellTime(99.0)}
    assert seconds_left(states, times, 1) == (100 * 1 + 7) + (60 * 3 + 5)


def test_without_a_finished_cell_of_its_row_a_cell_costs_what_it_reports_or_what_others_cost():
    states = cells(("a", "done", 100), ("b", "training", 50), ("b", "waiting", 0))
    times = {("a", 0): CellTime(1.0, 7.0), ("b", 1): CellTime(2.0)}
    assert seconds_left(states, times, 1) == (50 * 2 + 7) + (100 * 1 + 7)
    states = cells(("a", "training", 50), ("b", "waiting", 0))
    assert seconds_left(states, {("a", 0): CellTime(2.0)}, 1) == 50 * 2 + 100 * 2, "no test is known yet"
    assert seconds_left(states, {}, 1) is None


def test_before_any_cell_has_finished_tests_cost_what_running_cells_expect():
    states = cells(("a", "training", 50), ("b", "waiting", 0))
    times = {("a", 0): CellTime(2.0, expected_test_s=30.0)}
    assert seconds_left(states, times, 1) == (50 * 2 + 30) + (100 * 2 + 30)


def test_a_test_task_is_expected_to_cost_a_training_task_for_each_model(run):
    test = EvalConfig(tasks=50, label_permutations=2)
    metrics = run.last_metrics()
    assert running_time(run, metrics, test) == CellTime(2.0, expected_test_s=1.0 * 50 * 2)
    run.config = replace(run.config, epochs=9)
    assert running_time(run, metrics, test).expected_test_s == 1.0 * 50 * 2 * 5
    assert running_time(run, metrics, replace(test, models="best")).expected_test_s == 1.0 * 50 * 2
    assert running_time(run, [], test) is None
    run.config = replace(run.config, dataset="navigation")
    assert running_time(run, metrics, test).expected_test_s == 1.0 * 50 * 2, "policies have no ensemble"


def test_workers_share_the_cells_but_not_a_single_one():
    states = cells(*[("a", "waiting", 0)] * 4, ("a", "done", 100))
    times = {("a", 4): CellTime(1.0, 0.0)}
    assert seconds_left(states, times, workers=2) == 200
    assert seconds_left(states, times, workers=8) == 100


def test_cells_of_earlier_calls_count_as_slow_as_the_machine_is_now():
    states = cells(
        ("a", "done", 100), ("a", "done", 100), ("b", "done", 100), ("a", "waiting", 0), ("b", "waiting", 0)
    )
    times = {
        ("a", 0): CellTime(1.0, 8.0, earlier=True),
        ("a", 1): CellTime(3.0, 16.0),  # in this call: training takes 3 times as long, and testing twice
        ("b", 2): CellTime(2.0, 10.0, earlier=True),
    }
    assert seconds_left(states, times, 1) == (100 * 3 + 16) + (100 * 6 + 20)
    del times["a", 1]
    assert seconds_left(states, times, 1) == (100 * 1 + 8) + (100 * 2 + 10), "the current speed is unknown"


def test_nothing_is_left_of_cells_that_are_over():
    assert seconds_left(cells(("a", "done", 100), ("a", "diverged", 3), ("a", "failed", 5)), {}, 1) == 0


def test_only_tests_are_left():
    states = cells(("a", "done", 100), ("a", "testing", 100), ("b", "waiting", 100))
    assert seconds_left(states, {("a", 0): CellTime(1.0, 7.0)}, 1) == 14


@pytest.fixture
def run(tmp_path, glyphs_root):
    """A finished run of 4 meta-steps with 2 tasks each, which reported 8, 1, 2 and 1 tasks per second."""
    config = tiny_grid(tmp_path / "g", glyphs_root, "inner_lr=0.1,0.4", seeds=(0,)).cells[0].config
    config = replace(config, epochs=1, steps_per_epoch=4, meta_batch_size=2)
    with new_run(tmp_path / "run", config, config, command="mamlctl train", environment={}) as run:
        for step, speed in enumerate((8.0, 1.0, 2.0, 1.0), start=1):
            row = {"step": step, "epoch": 0, "tasks_per_second": speed, "query_losses": [1.0, None]}
            run.append_metrics("report", row)
        run.set_state(RunState("finished", 4))
        return run


def a_test(run, seconds=3.0):
    return StoredEvaluation({}, {"best": np.array([0.9])}, {}, 0, 1, (), run.path, seconds)


def test_the_time_of_a_meta_step_is_the_median_without_the_warm_up(run):
    assert step_time(run, run.last_metrics()) == 2.0
    assert step_time(run, run.last_metrics()[:1]) == 0.25
    assert step_time(run, []) is None
    assert finished_time(run, [], a_test(run)) is None


def test_a_finished_cell_has_cost_the_time_between_its_first_and_its_last_file(run):
    now = time.time()
    os.utime(run.path / CONFIG, (now, now))
    os.utime(run.path / STATUS, (now + 20, now + 20))
    metrics = run.last_metrics()
    assert finished_time(run, metrics, a_test(run)) == CellTime(pytest.approx(5.0), 3.0)
    os.utime(run.path / STATUS, (now, now))  # as in a copy
    assert finished_time(run, metrics, a_test(run, seconds=None)) == CellTime(2.0, 0.0)
    os.utime(run.path / STATUS, (now + 80_000, now + 80_000))
    (run.path / COMMANDS).write_text("mamlctl train\nmamlctl train --resume run\n")
    assert finished_time(run, metrics, a_test(run)) == CellTime(2.0, 3.0), "it was interrupted for a day"


def test_a_finished_cell_has_started_two_processes(run):
    (run.path / SUMMARY).write_text("{}")
    ended = (run.path / STATUS).stat().st_mtime
    for after, start in (
        (3.0 + 4.0, 4.0),
        (3.0 + 90.0, 0.0),
        (-50.0, 0.0),
    ):  # the test of another call has none
        os.utime(run.path / SUMMARY, (ended + after, ended + after))
        found = finished_time(run, run.last_metrics(), a_test(run))
        assert found.test_s == pytest.approx(3.0 + 2 * start)


class Idle:
    """An executor whose jobs never end."""

    slots = 2

    def start(self, job):
        pass

    def ended(self):
        return []


def test_a_resumed_grid_shows_the_time_left_and_the_losses_at_once(tmp_path, glyphs_root, monkeypatch):
    grid = tiny_grid(tmp_path / "g", glyphs_root, "inner_lr=0.1,0.4", seeds=(0, 1))
    done, running, *_ = grid.cells
    total = done.config.total_steps
    for cell, speed in ((done, 4.0), (running, 2.0)):
        with new_run(cell.folder, cell.config, cell.config, command="mamlctl train", environment={}) as run:
            row = {"step": 2, "epoch": 0, "tasks_per_second": speed, "query_losses": [1.5, None, 0.5]}
            run.append_metrics("report", {**row, "step": 1})
            run.append_metrics("report", row)
            run.set_state(RunState("finished", total) if cell is done else RunState("interrupted", 2))
    monkeypatch.setattr(
        scheduler, "find_evaluation", lambda run, test: a_test(run, 30.0) if run.path == done.folder else None
    )
    events = []
    stop = StopRequests(ignore, time_limit_s=None)
    filling = Scheduler(grid, grid.cells[1:], Idle(), stop, events.append, offline=True)
    filling._start_jobs()
    filling._report()
    (event,) = [event for event in events if isinstance(event, GridChanged)]
    (cell,) = [cell for cell in event.cells if cell.query_losses]
    assert (cell.row, cell.seed, cell.state) == (running.row.label, running.seed, "training")
    assert cell.query_losses[::2] == (1.5, 0.5) and np.isnan(cell.query_losses[1])
    assert cell.loss_history == (0.5, 0.5)
    batch = done.config.meta_batch_size
    of_done = total * batch / 4.0 + 30.0  # the other seed of its row, and the other cell of the other row
    of_running = (total - 2) * batch / 2.0 + 30.0
    of_all = 2 * of_done + of_running
    assert event.seconds_left == pytest.approx(max(of_all / 2, of_running), rel=0.01)
