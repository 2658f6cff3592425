"""One process at a time, where two would harm each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import NO_LOCKS, lock_holder

if TYPE_CHECKING:
    from filelock import BaseFileLock

# How often to make the folder that other processes remove; /proc never has one.
TRIES = 100


@contextmanager
def locked(path: Path, what: str, on_event: OnEvent) -> Iterator[None]:
    """Hold lock file `path` for the block; whoever else wants it waits, and says so. It is gone afterwards.

    Raises DataError where no file can be written.
    """
    from filelock import FileLock  # here, since its import takes as long as that of the command line

    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, what, on_event)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            message = f"cannot write {path.parent}: {error.strerror or error}"
            raise DataError(message, hint="make room or choose another --data-root") from error
        on_event(Notice(f"no locks on this file system: let no other process fetch {what} now"))
    try:
        with suppress(OSError):  # a full disk: then those who wait do not learn for whom
            path.write_text(f"process {os.getpid()}")
        yield
    finally:
        path.unlink(missing_ok=True)  # those who wait for it see that, and lock a new one
        lock.release()
        with suppress(OSError):  # not empty, most often
            path.parent.rmdir()


def _acquire(lock: BaseFileLock, path: Path, what: str, on_event: OnEvent) -> None:
    from filelock import Timeout

    is_waiting = False
    for tries_left in reversed(range(TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=is_waiting)
            return
        except Timeout:
            is_waiting = True
            on_event(Notice(f"{lock_holder(path)} is at work on {what}: waiting for it"))
        except FileNotFoundError:  # another process has removed the empty folder in between
            if not tries_left:
                raise
