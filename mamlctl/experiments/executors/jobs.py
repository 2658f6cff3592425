"""Jobs for executors: the commands that train and test one cell of a grid."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mamlctl.core.errors import ExitCode
from mamlctl.core.process import HANG_UP, module_command
from mamlctl.run_folder import CONFIG, run_state
from mamlctl.settings.variables import without_variables

Arguments = tuple[str, ...]  # of the command line after `mamlctl`
KILLED = -9  # the exit code of a process that SIGKILL ended; Windows does not define the signal


@dataclass(frozen=True)
class Job:
    """A run folder to train, unless its training has ended, and then to test."""

    name: str
    folder: Path  # absolute
    train: Arguments  # of `mamlctl train` without --out
    evaluate: Arguments  # of `mamlctl eval` after the folder; empty if no test is needed
    overrides: Arguments = ()  # of `mamlctl train --resume` after the folder

    def train_command(self, folder: Path, time_limit: str | None = None) -> Arguments | None:
        """The command that starts or resumes training; None if training has ended.

        Args:
            folder: where the job's run folder is now.
            time_limit: as `mamlctl train --time-limit` takes it; None for no limit.
        """
        if run_state(folder).ended:
            return None
        limit = () if time_limit is None else ("--time-limit", time_limit)
        if (folder / CONFIG).is_file():
            return ("train", "--resume", str(folder), *self.overrides, *limit)
        return ("train", *self.train, "--out", str(folder), *limit)

    def eval_command(self, folder: Path) -> Arguments | None:
        """The command that tests the run in `folder`; None if there is nothing to test."""
        if not self.evaluate or run_state(folder).status != "finished":
            return None
        return ("eval", str(folder), *self.evaluate)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    name: str
    code: int  # exit code of its last command, or minus the number of the signal that killed it
    error: str = ""  # the error that this command reported

    @property
    def failed(self) -> bool:
        """Whether the job failed: it did not finish, diverge or stop on request."""
        stopped = (ExitCode.HUNG_UP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
        return self.code not in (ExitCode.OK, ExitCode.DIVERGED, *stopped)

    @property
    def reason(self) -> str:
        """Why it failed, for people."""
        if self.code == KILLED:
            return "killed by SIGKILL: out of memory?"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        return self.error or f"exit code {self.code}"


class Executor(Protocol):
    """Runs jobs somewhere; their results end up in the jobs' folders."""

    slots: int  # jobs at a time

    def start(self, job: Job) -> None:
        """Start a job; not called while `slots` jobs are running."""

    def ended(self) -> Sequence[Ended]:
        """The jobs that have ended since the last call; does not wait."""

    def stop(self, number: int) -> None:
        """Make all running jobs save and end, as this signal does, and wait for them."""


class ChildProcess:
    """A `mamlctl` command in its own process, so that a crash or a lack of memory affects nothing else."""

    def __init__(self, arguments: Arguments, environment: Mapping[str, str], output: BinaryIO | int) -> None:
        """Start the command.

        Args:
            arguments: the command line after `mamlctl`.
            environment: the environment variables of the process; those that are defaults of settings are
                removed, since the arguments or the run folder decide.
            output: a file, or the number of one, for everything it prints.
        """
        handle, name = tempfile.mkstemp()
        os.close(handle)  # Windows lets no other process write a file that is open here
        self._error = Path(name)
        self.process = subprocess.Popen(
            [*module_command("mamlctl.cli.child_process"), name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=without_variables(environment),
            start_new_session=True,  # only the parent gets Ctrl-C, and passes it on
        )

    def stop(self, number: int) -> None:
        """Pass on a signal, with which the command saves and ends."""
        if HANG_UP:
            self.process.send_signal(number)
        elif number != signal.SIGINT:  # on Windows, Ctrl-C has reached the command already
            self.process.terminate()

    def wait(self) -> tuple[int, str]:
        """Wait for the command; return its exit code, as in `Ended`, and its error. Call this only once."""
        code = self.process.wait()
        error = ""
        with suppress(FileNotFoundError):  # removed from the folder of temporary files
            error = self._error.read_text(encoding="utf-8", errors="replace")
            self._error.unlink()
        return code, error
