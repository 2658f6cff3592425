"""A cell of a grid as work for somebody: which commands bring its run folder to the end, who runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mamlctl.run_folder import CONFIG, run_state


@dataclass(frozen=True)
class Job:
    """A run folder to be trained to its end, unless it is there already, and then tested."""

    name: str
    folder: Path  # absolute
    train: tuple[str, ...]  # arguments of `mamlctl train` but for --out
    evaluate: tuple[str, ...]  # arguments of `mamlctl eval` after the folder; empty: tested already
    moved: tuple[str, ...] = ()  # arguments of `mamlctl train --resume`: where the run goes on

    def train_command(self, folder: Path, time_limit: str | None = None) -> tuple[str, ...] | None:
        """Arguments of `mamlctl` that train on from what `folder` holds; None when it is trained to the end.

        `folder`: where the job's run folder lies now. `time_limit`: after it the same question has another
        answer.
        """
        if run_state(folder).status in ("finished", "diverged"):
            return None
        limit = () if time_limit is None else ("--time-limit", time_limit)
        if (folder / CONFIG).is_file():
            return ("train", "--resume", str(folder), *self.moved, *limit)
        return ("train", *self.train, "--out", str(folder), *limit)

    def eval_command(self, folder: Path) -> tuple[str, ...] | None:
        """Arguments of `mamlctl` that test the run in `folder`; None when there is nothing to test."""
        if not self.evaluate or run_state(folder).status != "finished":
            return None
        return ("eval", str(folder), *self.evaluate)


@dataclass(frozen=True)
class Ended:
    """How a job ended: the exit code of its last command, and the last lines that it said."""

    name: str
    code: int  # an ExitCode, or minus the number of the signal that killed it
    said: str


class Executor(Protocol):
    """Runs jobs somewhere; their results come back into the jobs' folders."""

    slots: int  # jobs at a time

    def start(self, job: Job) -> None:
        """Begin a job. Never called while `slots` jobs are under way."""

    def ended(self) -> Sequence[Ended]:
        """The jobs that ended since the last call; does not wait for any."""

    def stop(self, number: int) -> None:
        """Ask what runs to save and end, as that signal does, and wait until it has."""
