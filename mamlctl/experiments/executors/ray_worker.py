"""A job's work on another machine, slice by slice: its run folder arrives, goes on, and is sent back."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import mamlctl
from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.files import replacing, write_text
from mamlctl.experiments.executors.jobs import Job
from mamlctl.run_folder import CONFIG, METRICS, STATUS

LOCK, COMMANDS = "lock", "command.txt"

ROOM, HELD = "mamlctl-place-", "held"  # a place's folder among the temporary ones, and the file locked in it

# As a training writes them: settings before all else; the checkpoint after the metrics that it rewinds to
# itself; then how the run stands. Whatever else there is lies between the first and the second.
WRITTEN = {CONFIG: 0, METRICS: 2, "checkpoints/last.pt": 3, STATUS: 4}

SAID_BYTES = 2000  # of a command's last words: an error's two lines, or the end of a traceback

SAVE_S = 50.0  # after a signal, for a meta-step and a save; then the child is killed


@dataclass(frozen=True)
class Files:
    """A run folder on its way: the names of its files in the order to write them, and those that changed."""

    names: tuple[str, ...]
    changed: Mapping[str, bytes]


@dataclass(frozen=True)
class SliceResult:
    """What one command on a node came to."""

    files: Files | None  # None: nothing was tried
    code: int  # as in jobs.Ended
    said: str


def names_in(folder: Path) -> tuple[str, ...]:
    """A run folder's files in the order to write them; no lock, nothing of writes that were cut off."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")]
    return tuple(sorted((name for name in names if name != LOCK), key=lambda name: WRITTEN.get(name, 1)))


def stamps(folder: Path) -> dict[str, object]:
    """What changes in each file with every write, since each is replaced or lengthened."""
    found = {name: (folder / name).stat() for name in names_in(folder)}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def pack(folder: Path, known: Mapping[str, object] | None = None) -> Files:
    """A run folder's files; without the content of those whose stamps the other side knows."""
    now = stamps(folder)
    changed = [name for name in now if not known or known.get(name) != now[name]]
    return Files(tuple(now), {name: (folder / name).read_bytes() for name in changed})


def unpack(files: Files, folder: Path) -> None:
    """Make `folder` hold these files: each replaced in one move, then those removed that are no more.

    Cut off anywhere, it leaves a run that resumes to the same end. Raises MamlctlError, before anything is
    written, for a name that leads out of the folder.
    """
    for path in map(PurePosixPath, files.names):
        if path.is_absolute() or ".." in path.parts:
            raise MamlctlError(f"a node sent a file named {path}", hint="use a cluster that you trust")
    for name in files.names:
        if name in files.changed:
            with replacing(folder / name) as file:
                file.write(files.changed[name])
    for name in set(names_in(folder)) - set(files.names):
        (folder / name).unlink()


class WorkerSlot:
    """A job's place on a node: a folder of its own there, and the command under way in it.

    Its methods may be called from several threads.
    """

    def __init__(self, job: Job, cpus: float, version: str) -> None:
        """`version`: of the mamlctl that asks."""
        self._job, self._version = job, version
        self._threads = max(int(cpus), 1)
        _clear_rooms()
        self._room = Path(tempfile.mkdtemp(prefix=ROOM))
        self._held = (self._room / HELD).open("wb")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self._folder = self._room / job.folder.name
        self._known: dict[str, object] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped, self._turn = 0, threading.Lock()

    def work(self, files: Files | None, time_limit: str) -> SliceResult:
        """One command: train on for so long, or test. `files`: None: as the last slice left them here."""
        if self._version != mamlctl.__version__:
            here = f"{socket.gethostname()} has mamlctl {mamlctl.__version__}"
            said = f"error: {here}, but the command is {self._version}\nhint:  install one release everywhere"
            return SliceResult(None, ExitCode.FAILED, said)
        if files is not None:
            unpack(files, self._folder)
            self._known = stamps(self._folder)
        words = self._job.train_command(self._folder, time_limit) or self._job.eval_command(self._folder)
        code, said = self._run(words or ())
        path = self._folder / COMMANDS
        if path.is_file():
            write_text(path, self._as_it_lasts(path.read_text()))
        changed = pack(self._folder, self._known)
        self._known = stamps(self._folder)
        return SliceResult(changed, code, self._as_it_lasts(said))

    def stop(self, number: int) -> None:
        """Pass a signal on to the command under way, and let none begin; does not wait."""
        with self._turn:
            self._stopped = number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)
                late = threading.Timer(SAVE_S, self._child.kill)
                late.daemon = True
                late.start()

    def node(self) -> str:
        """Ray's name for the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def leave(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._room, ignore_errors=True)
        self._held.close()

    def _run(self, words: tuple[str, ...]) -> tuple[int, str]:
        with tempfile.TemporaryFile() as output:
            with self._turn:
                if self._stopped or not words:
                    return 128 + self._stopped if self._stopped else ExitCode.OK, ""
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "mamlctl.cli.child_process", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
                )
            code = self._child.wait()
            return code, _end_of(output)

    def _as_it_lasts(self, text: str) -> str:
        """The text with the job's own folder in place of the one here, which will be no more."""
        return text.replace(str(self._folder), shlex.quote(str(self._job.folder)))


def _clear_rooms() -> None:
    """Remove what places left on this node that were killed, which is what nobody locks."""
    for held in Path(tempfile.gettempdir()).glob(f"{ROOM}*/{HELD}"):
        with suppress(OSError), held.open("rb") as file:  # locked, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)


def _end_of(output: BinaryIO) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(size - SAID_BYTES, 0))
    return output.read().decode(errors="replace").strip()
