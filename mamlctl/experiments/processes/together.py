"""The work of several processes: rank 0 runs the command, and the others do their share of its work.

Rank 0 alone reads the command line, writes files and prints. Before work that is shared it opens the data,
which may first have to be downloaded, and then sends a job.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mamlctl.core.errors import ExitCode, MamlctlError, RankLostError, SettingsError
from mamlctl.core.events import Event, Notice, OnEvent
from mamlctl.core.formatting import plural
from mamlctl.core.lifeline import Lost
from mamlctl.core.problems import flag
from mamlctl.core.process import LAUNCHED, SHOW_CURSOR, world
from mamlctl.engine.algorithms.rules import sharing_problems
from mamlctl.engine.distributed import Ranks, current, leave_ranks, open_ranks
from mamlctl.engine.training.run_code import RunCode
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

FRAMES = 6  # of the calls in which a process hangs, two lines each
BEAT_S = 0.5  # between two messages to ranks that wait for a job
BUSY = "busy"  # the message that rank 0 works on something before the next job


@dataclass(frozen=True)
class TrainingJob:
    """A run to train."""

    config: TrainConfig
    cuda_graph: bool | None  # as it was given now: a run may resume on another machine
    offline: bool
    run: Path | None = None  # with the code of its network; None: the code that the settings name
    stored: Mapping[str, Sequence[str]] | None = None  # the split of a resumed run


@dataclass(frozen=True)
class EvaluationJob:
    """A run to evaluate."""

    run: Path
    settings: EvalConfig
    offline: bool


Job = TrainingJob | EvaluationJob


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


def check_code_of_ranks(code: RunCode) -> None:
    """Raise SettingsError if the user's code on this rank's machine is not that of rank 0."""
    stored = code.stored
    digests = {setting: part.digest for setting, part in stored.items()}
    of_first = current().from_first(digests) if digests else {}
    for setting, part in stored.items():
        if of_first[setting] != part.digest:
            fact = f"the files of {flag(setting)} ({part}) differ from those of rank 0"
            raise SettingsError([(fact, "copy them to all machines, or name them in a shared folder")])


@contextmanager
def send_after(job: Job, on_event: OnEvent) -> Iterator[OnEvent]:
    """Let the other ranks begin their share of a job after the block, in which rank 0 opens the data.

    A download may last longer than --rank-timeout. So each event in the block restarts their wait. On the
    other ranks, and with a single process, this does nothing.

    Args:
        job: the job.
        on_event: receives progress and notices.

    Yields:
        The receiver of events for the work in the block.
    """
    ranks, told_at = current(), time.monotonic()
    sends = waiting = ranks.rank == 0 and ranks.count > 1

    def show(event: Event) -> None:
        nonlocal told_at
        on_event(event)
        if waiting and time.monotonic() - told_at > BEAT_S:
            ranks.from_first(BUSY)
            told_at = time.monotonic()

    try:
        yield show
    finally:
        waiting = False
    if sends:
        ranks.from_first(job)


def jobs(ranks: Ranks) -> Iterator[Job]:
    """What rank 0 sends, on the other ranks, until it has no more jobs."""
    while (job := ranks.from_first()) is not None:
        if job != BUSY:
            yield job


@contextmanager
def sharing(timeout_s: float) -> Iterator[None]:
    """The block in which rank 0 shares its work; `timeout_s` is the longest wait for another process."""
    lifeline = open_ranks(timeout_s, on_stuck).lifeline
    assert lifeline is not None
    try:
        yield
        current().from_first(None)  # the last job
    finally:
        lifeline.leave(_exit_code(sys.exception()))
        leave_ranks()


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


def follow(timeout_s: float, do: Callable[[Job], ExitCode]) -> ExitCode:
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
        for job in jobs(ranks):
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
