"""The state of a new process: Ctrl-C, closed streams, the size of the terminal, and its rank."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mamlctl.core.errors import SettingsError

# The signal of a terminal that closes; empty on Windows, which has no such signal.
HANG_UP: tuple[int, ...] = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
RAISE_S = 0.01  # after `_raise_again` has returned, since exceptions in it are dropped too
SHOW_CURSOR = b"\x1b[?25h"  # the live view hides it
SIDE_BY_SIDE = "use --workers, which trains several runs at once"  # the hint where --nproc has no effect
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TORCHRUN = "TORCHELASTIC_RUN_ID"  # a variable that torchrun sets
LAUNCHED = "RANKS_OF_MAMLCTL"  # the variable with the process id of `launch`, which has started this one


def prepare_process() -> None:
    """Prepare for the slow imports of a command, which come after this call."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in the background
        exit_at_once_on(signal.SIGINT)
    _open_closed_streams()
    # Some terminals export a size of 0, with which rich prints nothing.
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").strip("0") == "":
            os.environ.pop(name, None)


def module_command(module: str) -> list[str]:
    """The start of the command line that runs a module in a new process.

    Python's -m searches the current folder first, where a file of the user may have the name of a module. So
    the new process does that only if this one does.
    """
    searched = sys.path[:1] in ([""], [str(Path.cwd())])
    return [sys.executable, *([] if searched else ["-P"]), "-m", module]


def end_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to send SIGTERM when the parent ends; has no effect except on Linux.

    `parent` is the process that started this one, which ends at once if that has ended; None: not known.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes  # not at the top: few commands need it

    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        sys.exit(128 + signal.SIGTERM)


def exit_at_once_on(*numbers: int) -> None:
    """Let signals that are not ignored end the process silently, without cleanup.

    For imports and for the end of the process: a KeyboardInterrupt during imports would print a traceback, or
    be replaced by an ImportError.
    """
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _exit_at_once)


def raise_on_signals() -> None:
    """Let signals raise KeyboardInterrupt or SystemExit, for work that needs cleanup.

    A second Ctrl-C exits at once. Has no effect on signals that would not end the process at once.
    """
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: _exit, **dict.fromkeys(HANG_UP, _exit)}
    for number, handler in handlers.items():
        if signal.getsignal(number) == _exit_at_once:
            signal.signal(number, handler)
            sys.unraisablehook = _raise_again


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt; the next Ctrl-C exits at once."""
    exit_at_once_on(signal.SIGINT)
    raise KeyboardInterrupt


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat the exception of a signal during the deletion of an object, where Python drops exceptions."""
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(unraisable)
        return
    code = error.code if isinstance(error, SystemExit) else None
    on_time = interrupt if code is None else lambda number, frame: sys.exit(code)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, on_time)
        signal.setitimer(signal.ITIMER_REAL, RAISE_S)
    else:  # Windows
        signal.signal(signal.SIGINT, on_time)
        threading.Timer(RAISE_S, _thread.interrupt_main).start()


def _open_closed_streams() -> None:
    """Open /dev/null in place of each closed standard stream, so that no other file takes its place."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def world() -> tuple[int, int]:
    """The rank of this process and the number of processes, which torchrun puts into the environment.

    Raises SettingsError if the variables are wrong.
    """
    if not all(map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))):
        return 0, 1
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    try:
        rank, count, port = map(int, numbers.values())
    except ValueError:
        rank, count, port = -1, 0, 0
    if not (0 <= rank < count and 0 <= port < 2**16):
        stated = ", ".join(f"{name}={value}" for name, value in numbers.items())
        fact = f"the variables {stated} do not describe a process of a run"
        raise SettingsError([(fact, "unset them, or start the processes with --nproc or torchrun")])
    return rank, count


def check_single(what: str, hint: str = "run it without torchrun") -> None:
    """Raise SettingsError if torchrun has started several processes for `what`, which a single one does."""
    if (count := world()[1]) > 1:
        raise SettingsError([(f"{what} is one process, but torchrun has started {count}", hint)])


def restarts() -> tuple[int, int]:
    """How often torchrun has restarted this process after a failure, and how often it may."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    done, most = (int(os.environ.get(name) or 0) for name in names)
    return done, most
