"""python -m mamlctl.cli.child_process FILE ...: `mamlctl ...` as the child of an executor.

It ends when the thread that started it ends, and writes its error to FILE.
"""

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

from mamlctl.cli.app import main
from mamlctl.core.errors import MamlctlError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent is gone; where it cannot (not Linux), nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it went before the kernel knew
        sys.exit(128 + signal.SIGTERM)


def hear_signals() -> None:
    """Take SIGINT and SIGTERM even where the parent blocks or ignores them, as Ray's workers do SIGINT."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)


def report_error(path: Path, error: BaseException) -> None:
    """Write the error that ends this process, as one line, to a file that the executor reads."""
    if isinstance(error, MamlctlError):
        text = error.message
    else:
        text = "".join(traceback.format_exception_only(error))
    line = "; ".join(part.strip() for part in text.strip().splitlines())
    path.write_text(line, encoding="utf-8", errors="replace")


def run(path: Path) -> None:
    """Be `mamlctl` with the rest of the command line."""

    def on_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report_error(path, error)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = on_bug
    hear_signals()
    end_with_parent()
    main(on_error=lambda error: report_error(path, error))


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
