"""Atomic file replacement, and folder locks."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from mamlctl.core.errors import LockedError, MamlctlError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Errors from a file system without locks, which is common on clusters.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_moving = threading.Lock()  # held while `read_at` moves the position of a file
UNLOCKED = ".new"  # the end of a temporary file's name until the process that made it has locked it
# The temporary files that a killed process leaves in a folder that it has locked, and in its subfolders.
REMNANTS = (".*.*.????????", f".*.*.????????{UNLOCKED}", "*/.*.pt.*")


def exists(path: Path) -> bool:
    """Whether a path exists; one with a name that is too long for the file system does not."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Name the file in an error of the block: Python names none if a write fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` if the block succeeds and is removed otherwise.

    What killed processes have left of earlier files for this path is removed first.
    """
    path = path.resolve()  # a symbolic link is kept and leads to the new file
    if path.exists() and not path.is_file():  # a pipe or a device cannot be replaced
        with naming(path), path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_remnants(path)
    handle, unlocked = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNLOCKED)
    temporary = Path(unlocked if fcntl is None else unlocked.removesuffix(UNLOCKED))
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for `_remove_remnants`
                Path(unlocked).replace(temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                temporary.chmod(0o644)
                temporary.replace(path)  # while it is locked
        if fcntl is None:
            temporary.replace(path)  # Windows cannot move a file that is open
    finally:
        temporary.unlink(missing_ok=True)


def _remove_remnants(path: Path) -> None:
    if fcntl is None:  # `one_writer` removes them
        return
    for remnant in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):  # locked by a process that is writing it, or removed by another process
            if remnant.is_file():
                with remnant.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remnant.unlink()


def check_out(path: Path) -> None:
    """Raise MamlctlError unless files can be made in the folder `path`, which need not exist yet."""
    place, hint = path.absolute(), "choose an --out that can be read and written"
    try:
        while True:
            with suppress(FileNotFoundError, NotADirectoryError):
                place.lstat()
                break
            place = place.parent
        if not place.is_dir():
            raise MamlctlError(f"{place} is a file, not a folder", hint=hint)
        tempfile.TemporaryFile(dir=place).close()  # has no name, so no other process sees it
    except OSError as error:
        raise MamlctlError(f"{path} cannot be written: {error.strerror}", hint=hint) from error


def expanded(path: Path | str) -> Path:
    """The path with `~` or `~user` at its start replaced; unchanged if there is no such home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises RuntimeError without a home


def contents(folder: Path, first: str) -> list[str]:
    """The names in a folder, except what a process leaves if it is killed before it has written file `first`.

    These exceptions are the lock and the temporary file of `replacing`.
    """
    names = (entry.name for entry in folder.iterdir())
    return [name for name in names if name != "lock" and not name.startswith(f".{first}.")]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; file names in it that are not UTF-8 keep their bytes."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def read_text(path: Path) -> str:
    """Read what `write_text` and `append_text` have written."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def append_text(path: Path, text: str) -> None:
    """Append to a text file."""
    with naming(path), path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON cannot represent (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(document), indent=2, allow_nan=False) + "\n")


@contextmanager
def one_writer(path: Path, what: str = "run folder") -> Iterator[None]:
    """Lock a folder for the duration of the block, and remove what a killed process has left there.

    Args:
        path: the folder.
        what: the kind of folder, for messages.

    Raises:
        LockedError: another process or thread has locked the folder.
        MamlctlError: the file system has no locks.
    """
    from filelock import FileLock, Timeout  # not at the top: this import would double the start-up time

    try:
        # `is_locked` in another process may hold the lock for a moment.
        lock = FileLock(path / "lock", thread_local=False, fallback_to_soft=False).acquire(
            timeout=0.2, poll_interval=0.02
        )
    except Timeout as error:
        message = f"{what} {path} is in use by {lock_holder(path / 'lock')}"
        raise LockedError(message, hint="wait for it or stop it, or choose another --out") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        message = f"{what} {path} cannot be locked: {error.strerror}"
        raise MamlctlError(message, hint="choose another --out, on a file system with locks") from error
    with lock:
        if fcntl is not None:  # on Windows, a locked file cannot be written
            with naming(path / "lock"):
                (path / "lock").write_text(f"process {os.getpid()}", encoding="utf-8")
        for remnant in itertools.chain.from_iterable(map(path.glob, REMNANTS)):
            remnant.unlink(missing_ok=True)
        yield


def lock_holder(path: Path) -> str:
    """The process that holds the lock, as it is written in the lock file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:32] or "another process"
    except (FileNotFoundError, PermissionError):  # Windows cannot read a locked file
        return "another process"


def is_locked(path: Path) -> bool:
    """Whether a process is writing to the run folder, which may belong to another user."""
    if fcntl is None:
        return _is_held(path / "lock")
    try:
        # Not filelock, which can only test a lock in a folder where it may write.
        with (path / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return False


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock file, on a system without flock."""
    from filelock import FileLock, Timeout

    if not lock.exists():
        return False
    try:
        with FileLock(lock, thread_local=False).acquire(blocking=False):
            return False
    except Timeout:
        return True


def read_at(file: IO[bytes], size: int, start: int) -> bytes:
    """Read from a place in a file without moving its position, which threads share.

    Args:
        file: a file that is open for reading.
        size: bytes to read; fewer are returned at the end of the file.
        start: the place of the first byte.
    """
    number = file.fileno()
    if hasattr(os, "pread"):
        return os.pread(number, size, start)
    with _moving:  # Windows
        position = os.lseek(number, 0, os.SEEK_CUR)
        os.lseek(number, start, os.SEEK_SET)
        try:
            return os.read(number, size)
        finally:
            os.lseek(number, position, os.SEEK_SET)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged, not an object or not ordinary."""
    try:
        # A named pipe would be waited for.
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
