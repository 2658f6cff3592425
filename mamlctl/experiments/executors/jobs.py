"""A cell of a grid as work for an executor: the commands that bring its run folder to its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mamlctl.core.errors import ExitCode
from mamlctl.run_folder import CONFIG, run_state

Arguments = tuple[str, ...]  # of `mamlctl`


@dataclass(frozen=True)
class Job:
    """A run folder to be trained to its end, unless it is there already, and then tested."""

    name: str
    folder: Path  # absolute
    train: Arguments  # of `mamlctl train` but for --out
    evaluate: Arguments  # of `mamlctl eval` after the folder; empty: tested already
    overrides: Arguments = ()  # of `mamlctl train --resume`: settings that the run resumes with

    def train_command(self, folder: Path, time_limit: str | None = None) -> Arguments | None:
        """The command that trains on from what `folder` holds; None when it is trained to its end.

        Args:
            folder: where the job's run folder is now.
            time_limit: how long to train; afterwards there may be another command.
        """
        if run_state(folder).ended:
            return None
        limit = () if time_limit is None else ("--time-limit", time_limit)
        if (folder / CONFIG).is_file():
            return ("train", "--resume", str(folder), *self.overrides, *limit)
        return ("train", *self.train, "--out", str(folder), *limit)

    def eval_command(self, folder: Path) -> Arguments | None:
        """The command that tests the run in `folder`; None when there is nothing to test."""
        if not self.evaluate or run_state(folder).status != "finished":
            return None
        return ("eval", str(folder), *self.evaluate)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    name: str
    code: int  # exit code of its last command, or minus the number of the signal that killed it
    error: str = ""  # that this command reported

    @property
    def failed(self) -> bool:
        """Whether the job left its cell undone for a reason of its own."""
        stopped = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
        return self.code not in (ExitCode.OK, ExitCode.DIVERGED, *stopped)

    @property
    def reason(self) -> str:
        """Why it failed, for people."""
        if self.code == -signal.SIGKILL:
            return "killed by SIGKILL: out of memory?"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        return self.error or f"exit code {self.code}"


class Executor(Protocol):
    """Runs jobs somewhere; their results come back into the jobs' folders."""

    slots: int  # jobs at a time

    def start(self, job: Job) -> None:
        """Begin a job. Never called while `slots` jobs are under way."""

    def ended(self) -> Sequence[Ended]:
        """The jobs that ended since the last call; does not wait for any."""

    def stop(self, number: int) -> None:
        """Ask what runs to save and end, as that signal does, and wait until it has."""


class ChildProcess:
    """A `mamlctl` command in a process of its own, so that a crash or a full memory takes nothing else."""

    def __init__(self, arguments: Arguments, environment: Mapping[str, str], output: BinaryIO | int) -> None:
        """Start it, with what it prints going to `output`."""
        self._error = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mamlctl.cli.child_process", self._error.name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the process that started them all, which passes it on
        )

    def wait(self) -> tuple[int, str]:
        """Wait until it ends -> its exit code as in `Ended`, and the error that it reported. Once only."""
        code = self.process.wait()
        with self._error as file:
            file.seek(0)
            return code, file.read().decode(errors="replace")
