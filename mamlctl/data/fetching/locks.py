"""One process at a time, where two would harm each other."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, OnEvent

# What a file system says that has no locks, as clusters' often have not.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

TRIES = 100  # to open a file whose folder others take away; /proc never has one


@contextmanager
def locked(path: Path, what: str, on_event: OnEvent) -> Iterator[None]:
    """Hold lock file `path` for the block; whoever else wants it waits, and says so. It is gone afterwards.

    Raises DataError where no file can be written.
    """
    while True:
        with _opened(path) as file:
            _wait(file, what, on_event)
            if not _is_at(file, path):
                continue  # its holder deleted it while we waited, and others lock a new one
            try:
                with suppress(OSError):  # a full disk: then those who wait do not learn for whom
                    file.truncate(0)
                    file.write(f"process {os.getpid()}".encode())
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty, most often
                    path.parent.rmdir()
        return


def _opened(path: Path) -> FileIO:
    for tries_left in reversed(range(TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileIO(path, "a+")  # unbuffered: nothing is left to fail when it is closed
        except OSError as error:
            if isinstance(error, FileNotFoundError) and tries_left:
                continue  # another process took the empty folder away in between
            message = f"cannot write {path.parent}: {error.strerror or error}"
            raise DataError(message, hint="make room or choose another --data-root") from error
    raise AssertionError("the last try returns or raises")


def _wait(file: FileIO, what: str, on_event: OnEvent) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        other = file.read(32).decode(errors="replace") or "another process"
        on_event(Notice(f"{other} is at work on {what}: waiting for it"))
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        on_event(Notice(f"no locks on this file system: let no other process fetch {what} now"))


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
