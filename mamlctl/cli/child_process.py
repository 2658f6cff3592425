"""python -m mamlctl.cli.child_process: mamlctl, ended by SIGTERM when the thread that started it ends."""

import ctypes
import os
import signal
import sys

from mamlctl.cli.app import main

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


if __name__ == "__main__":
    hear_signals()
    end_with_parent()
    main()
