"""What can go wrong in a way that the user can act on, and the number the process then ends with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from mamlctl.core.literals import StopReason


class ExitCode(IntEnum):
    """The process's exit codes; the two signals follow the shell's 128 + number."""

    OK = 0  # done, or saved and stopped by --time-limit
    FAILED = 1  # failed
    USAGE = 2  # wrong usage, or settings that do not fit together
    DATA = 3  # data that are missing or damaged
    DIVERGED = 4  # training diverged
    LOCKED = 5  # another process is using the folder
    INTERRUPTED = 130  # Ctrl-C (SIGINT)
    TERMINATED = 143  # SIGTERM


# A time limit is a planned end.
STOP_EXIT_CODES: dict[StopReason, ExitCode] = {
    "": ExitCode.OK,
    "time limit": ExitCode.OK,
    "SIGINT": ExitCode.INTERRUPTED,
    "SIGTERM": ExitCode.TERMINATED,
}


class MamlctlError(Exception):
    """A failure the user can act on: printed as two lines, never as a traceback."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class DataError(MamlctlError):
    """A data set that is missing, damaged or not what it should be."""

    exit_code = ExitCode.DATA


class DivergedError(MamlctlError):
    """A loss or a gradient stopped being finite."""

    exit_code = ExitCode.DIVERGED

    def __init__(self, cause: str, *, hint: str = "", step: int | None = None) -> None:
        """`step`: the meta-step that failed; None outside meta-steps."""
        message = cause if step is None else f"training diverged at meta-step {step}: {cause}"
        super().__init__(message, hint=hint)
        self.cause, self.step = cause, step


class LockedError(MamlctlError):
    """A folder that another process is writing to."""

    exit_code = ExitCode.LOCKED


class SettingsError(MamlctlError):
    """Settings that are wrong alone or do not fit together; all of them at once."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """`problems`: (fact, way out) pairs, at least one."""
        (message, hint), *more = problems
        if more:
            lines = [f"  {fact} ({way})" if way else f"  {fact}" for fact, way in problems]
            message, hint = f"{len(problems)} settings are wrong\n" + "\n".join(lines), ""
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)
