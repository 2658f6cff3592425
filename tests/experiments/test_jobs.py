"""Tests of the ends of jobs: exit codes, errors, and the reaction of the scheduler."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
from helpers import preloaded
from helpers.grid_cases import ignore, tiny_grid

from mamlctl.cli.child_process import report_error
from mamlctl.core.errors import ExitCode, MamlctlError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.experiments.executors.jobs import ChildProcess, Ended
from mamlctl.experiments.grid import scheduler
from mamlctl.experiments.grid.scheduler import Scheduler
from mamlctl.experiments.interrupts import StopRequests


@pytest.mark.parametrize(
    ("end", "failed", "reason"),
    [
        (Ended("a", ExitCode.OK), False, ""),
        (Ended("a", ExitCode.DIVERGED, "diverged at meta-step 3"), False, ""),
        (Ended("a", ExitCode.INTERRUPTED), False, ""),
        (Ended("a", ExitCode.DATA, "omniglot is not here"), True, "omniglot is not here"),
        (Ended("a", 1), True, "exit code 1"),
        (Ended("a", -signal.SIGKILL), True, "killed by SIGKILL: out of memory?"),
        (Ended("a", -signal.SIGSEGV, "never printed"), True, "killed by signal 11"),
    ],
)
def test_a_failed_job_has_a_reason(end, failed, reason):
    assert end.failed == failed
    if failed:
        assert end.reason == reason


@pytest.mark.process
def test_a_child_reports_its_error_and_prints_it_too(monkeypatch):
    monkeypatch.setattr(sys, "executable", preloaded.python())
    with tempfile.TemporaryFile() as output:
        child = ChildProcess(("train", "--dataset", "glyps"), os.environ, output)
        code, error = child.wait()
        output.seek(0)
        printed = output.read().decode()
    assert (code, error) == (ExitCode.USAGE, "unknown data set 'glyps'")
    assert printed.startswith(f"error: {error}\nhint:  ")
    assert ChildProcess(("--version",), os.environ, subprocess.DEVNULL).wait() == (ExitCode.OK, "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MamlctlError("no such run", hint="train one"), "no such run"),
        (SettingsError([("one", "a"), ("two", "")]), "2 settings are wrong; one (a); two"),
        (ValueError("a bug\nof two lines"), "ValueError: a bug; of two lines"),
    ],
)
def test_errors_are_reported_as_one_line(tmp_path, error, line):
    report_error(tmp_path / "error", error)
    assert (tmp_path / "error").read_text() == line


class Scripted:
    """An executor whose jobs end at once, with exit codes and errors from a list."""

    slots = 1

    def __init__(self, *ends):
        self._ends, self._ended, self.started = list(ends), [], []

    def start(self, job):
        self.started.append(job.name)
        self._ended.append(Ended(job.name, *self._ends.pop(0)))

    def ended(self):
        ended, self._ended = self._ended, []
        return ended


def test_a_job_with_a_locked_folder_is_started_again(tmp_path, glyphs_root, monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_S", 0)
    grid = tiny_grid(tmp_path / "g", glyphs_root, "inner_lr=0.1,0.4", seeds=(0,))
    executor = Scripted((ExitCode.LOCKED, "in use"), (ExitCode.DATA, "no data"), (ExitCode.OK,))
    events = []
    stop = StopRequests(ignore, time_limit_s=None)
    filling = Scheduler(grid, grid.cells, executor, stop, events.append, offline=True)
    assert filling.run() == ""
    first, second = [cell.name for cell in grid.cells]
    assert executor.started == [first, second, first]
    assert filling.failed == {second: "no data"}
    assert [event.text for event in events if isinstance(event, Notice)] == [f"{second} failed: no data"]
