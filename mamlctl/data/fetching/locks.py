"""Locks, so that two processes never prepare the same data set at once."""

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

# Tries to create the folder, which other processes may remove. Limited, since every try in /proc fails.
TRIES = 100


@contextmanager
def locked(path: Path, what: str, on_event: OnEvent) -> Iterator[None]:
    """Hold lock file `path` during the block, after waiting for any other holder; then delete it.

    Args:
        path: the lock file.
        what: what the lock protects, for notices.
        on_event: receives a notice if another process holds the lock.

    Raises:
        DataError: the lock file cannot be written.
    """
    from filelock import FileLock  # imported here, since it takes as long as importing the command line

    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, what, on_event)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            message = f"cannot write {path.parent}: {error.strerror or error}"
            raise DataError(message, hint="free disk space or choose another --data-root") from error
        on_event(Notice(f"this file system has no locks: do not fetch {what} in another process now"))
    try:
        with suppress(OSError):  # if the disk is full, waiting processes cannot name the holder
            path.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        with suppress(PermissionError):  # on Windows, `release` removes it
            path.unlink(missing_ok=True)  # waiting processes notice this and lock a new file
        lock.release()
        with suppress(OSError):  # usually not empty
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
            on_event(Notice(f"waiting for {lock_holder(path)}, which is preparing {what}"))
        # Another process removed the empty folder after `mkdir` returned, or while it ran.
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise
