"""The work of several processes: rank 0 runs the command, and the others do their share of its work.

Rank 0 alone reads the command line, writes files and prints. Before work that is shared it sends a job.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mamlctl.core.errors import ExitCode, MamlctlError, RankLostError, SettingsError
from mamlctl.core.events import Event, Notice, OnEvent
from mamlctl.core.formatting import plural
from mamlctl.core.lifeline import Lost
from mamlctl.core.process import LAUNCHED, SHOW_CURSOR, world
from mamlctl.engine.algorithms.rules import sharing_problems
from mamlctl.engine.distributed import current, open_ranks
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

FRAMES = 6  # of the calls in which a process hangs, two lines each


@dataclass(frozen=True)
class TrainingJob:
    """A run to train."""

    config: TrainConfig
    cuda_graph: bool | None  # as it was given
    offline: bool
    run: Path | None = None  # with the code of its network; None: the code that the settings name
    stored: Mapping[str, Sequence[str]] | None = None  # the split of a resumed run


@dataclass(frozen=True)
class EvaluationJob:
    """A run to evaluate."""

    run: Path
    settings: EvalConfig
    offline: bool


def check_sharing(config: TrainConfig, on_event: OnEvent) -> None:
    """Raise SettingsError if several processes cannot share the tasks of these settings.

    Args:
        config: the settings.
        on_event: receives a notice if there are more processes than tasks.
    """
    ranks, tasks = current(), config.meta_batch_size
    problems = sharing_problems(config, ranks.count) + ranks.device_problems(config.device)
    if problems:
        raise SettingsError(problems)
    if ranks.count > tasks:
        idle = f"{ranks.count - tasks} of {ranks.count} processes have none"
        on_event(Notice(f"with {tasks} {plural(tasks, 'task')} per meta-step, {idle}"))


def send(job: TrainingJob | EvaluationJob) -> None:
    """Let the other ranks begin their share of a job; does nothing with a single process."""
    current().from_first(job)


@contextmanager
def sharing(timeout_s: float) -> Iterator[None]:
    """The block in which rank 0 runs a command; `timeout_s` is the longest wait for another process."""
    lifeline = open_ranks(timeout_s, on_stuck).lifeline
    assert lifeline is not None
    try:
        yield
        current().from_first(None)  # the last job
    finally:
        lifeline.leave(_exit_code(sys.exception()))


def _exit_code(error: BaseException | None) -> int:
    match error:
        case None:
            return ExitCode.OK
        case MamlctlError():
            return error.exit_code
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case SystemExit() if isinstance(error.code, int):
            return error.code
    return ExitCode.FAILED


def follow(timeout_s: float, do: Callable[[TrainingJob | EvaluationJob], ExitCode]) -> ExitCode:
    """Do the share of a rank other than 0, until rank 0 has no more jobs.

    Args:
        timeout_s: the longest wait for another process.
        do: does this rank's share of a job, and returns the exit code.

    Raises:
        RankLostError: another process died or does not answer.
    """
    ranks = open_ranks(timeout_s, on_stuck)
    assert ranks.lifeline is not None
    code = ExitCode.OK
    try:
        while (job := ranks.from_first()) is not None:
            code = do(job)
    except RankLostError:
        raise
    except MamlctlError as error:
        ranks.lifeline.leave(error.exit_code, error.message)
        raise
    ranks.lifeline.leave(code)
    return code


def on_stuck(lost: Lost) -> None:
    """End this process, because its main thread hangs, or waits for a process that is lost."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    hangs = lost.rank == world()[0]
    if hangs or LAUNCHED not in os.environ:
        os.write(2, f"error: {lost.text}\n".encode())
    if hangs:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        os.write(2, "".join(traceback.format_stack(frame)[-FRAMES:]).encode(errors="replace"))
    os._exit(ExitCode.FAILED if hangs else ExitCode.RANK_LOST)


def ignore(event: Event) -> None:
    """Drop an event, in a process that prints nothing."""
