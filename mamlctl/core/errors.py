"""Errors that the user can fix, and the exit codes of the process."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from mamlctl.core.literals import StopReason


class ExitCode(IntEnum):
    """The exit codes of the process; signals use 128 + their number, as in a shell."""

    OK = 0  # finished, or saved and stopped by --time-limit
    FAILED = 1  # any other failure, or a result that does not reach --fail-under or --fail-over
    USAGE = 2  # invalid options or settings
    DATA = 3  # missing or damaged data
    DIVERGED = 4  # training diverged
    LOCKED = 5  # another process is using the folder
    RANK_LOST = 6  # another process of the same run died or does not answer; the run can be resumed
    HUNG_UP = 129  # the terminal closed (SIGHUP)
    INTERRUPTED = 130  # Ctrl-C (SIGINT)
    TERMINATED = 143  # SIGTERM


# Reaching a time limit is not a failure.
STOP_EXIT_CODES: dict[StopReason, ExitCode] = {
    "": ExitCode.OK,
    "time limit": ExitCode.OK,
    "SIGINT": ExitCode.INTERRUPTED,
    "SIGTERM": ExitCode.TERMINATED,
    "SIGHUP": ExitCode.HUNG_UP,
}


class MamlctlError(Exception):
    """An error that the user can fix: printed as a fact and a hint, without a traceback."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def file_error(error: OSError) -> MamlctlError:
    """The error to print for a file that cannot be read or written, a problem that the user can fix."""
    file = f"{error.filename}: " if error.filename else ""
    hint = "free disk space, or choose a path that can be read and written"
    return MamlctlError(f"{file}{error.strerror or error}", hint=hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, according to an exception of Python, numpy, torch or the operating system."""
    text = str(error).lower()
    phrases = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
    named = isinstance(error, RuntimeError | OSError) and any(phrase in text for phrase in phrases)
    # From the dynamic linker, e.g. for torch; if memory is not the reason, the reason follows.
    if isinstance(error, ImportError):
        named = any(line.endswith("failed to map segment from shared object") for line in text.splitlines())
    return named or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


class DataError(MamlctlError):
    """A data set is missing, damaged or not the expected one."""

    exit_code = ExitCode.DATA


class DivergedError(MamlctlError):
    """A loss or a gradient stopped being finite."""

    exit_code = ExitCode.DIVERGED

    def __init__(self, cause: str, *, hint: str = "", step: int | None = None) -> None:
        """Describe the failure.

        Args:
            cause: what is not finite.
            hint: what the user can do about it.
            step: the meta-step that failed; None outside meta-steps.
        """
        message = cause if step is None else f"training diverged at meta-step {step}: {cause}"
        super().__init__(message, hint=hint)
        self.cause, self.step = cause, step


class LockedError(MamlctlError):
    """Another process is writing to the folder."""

    exit_code = ExitCode.LOCKED


class RankLostError(MamlctlError):
    """Another process of the same run died or does not answer."""

    exit_code = ExitCode.RANK_LOST

    def __init__(self, what: str) -> None:
        super().__init__(what, hint="start the command again; a training run continues with --resume")


class SettingsError(MamlctlError):
    """Settings are wrong or do not fit together; one error reports all problems."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """`problems`: (fact, hint) pairs, at least one."""
        (message, hint), *more = problems
        if more:
            lines = [f"  {fact} ({hint})" if hint else f"  {fact}" for fact, hint in problems]
            message, hint = f"{len(problems)} settings are wrong\n" + "\n".join(lines), ""
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)
