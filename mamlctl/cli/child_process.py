"""python -m mamlctl.cli.child_process FILE ...: run `mamlctl ...` as a child process of an executor.

The process ends when the thread that started it ends, and writes its error to FILE.
"""

import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

from mamlctl.core.errors import MamlctlError
from mamlctl.core.process import end_with_parent, exit_at_once_on


def accept_signals() -> None:
    """Handle SIGINT and SIGTERM even if the parent blocks or ignores them, as Ray workers do with SIGINT."""
    accepted = (signal.SIGINT, signal.SIGTERM)
    for number in accepted:
        signal.signal(number, signal.SIG_DFL)  # the next call leaves ignored signals alone
    exit_at_once_on(*accepted)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no parent can block a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, accepted)


def report_error(path: Path, error: BaseException) -> None:
    """Write the error that ends this process to `path`, on a single line, for the executor to read."""
    if isinstance(error, MamlctlError):
        text = error.message
    else:
        text = "".join(traceback.format_exception_only(error))
    line = "; ".join(part.strip() for part in text.strip().splitlines())
    path.write_text(line, encoding="utf-8", errors="replace")


def run(path: Path) -> None:
    """Run `mamlctl` with the remaining arguments; write an error, or a bug's exception, to `path`."""

    def on_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report_error(path, error)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = on_bug
    accept_signals()
    end_with_parent()
    from mamlctl.cli.app import run_program

    run_program(on_error=lambda error: report_error(path, error))


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
