"""The part of a job that runs on a Ray node: a slot receives a run folder, trains it and sends it back."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

import mamlctl
from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.files import read_text, replacing, write_text
from mamlctl.experiments.executors.jobs import Arguments, ChildProcess, Job
from mamlctl.run_folder import COMMANDS, CONFIG, METRICS, STATUS

LOCK = "lock"  # of a run folder's writer

# The name of a slot's temporary folder, and of the file in it that is locked while the slot exists.
SLOT_FOLDER = "mamlctl-slot-"
SLOT_LOCK = "in-use"

# The order in which training writes its files: the settings, all other files, the metrics, the checkpoints
# to resume from (which rewind the metrics to their own step), and the status.
WRITE_ORDER = {CONFIG: 0, METRICS: 2, "checkpoints/previous.pt": 3, "checkpoints/last.pt": 4, STATUS: 5}
SAVE_S = 50.0  # time for a meta-step and a save after a signal; then the child is killed


@dataclass(frozen=True)
class Files:
    """A run folder to send: the names of its files in the order of writing, and what has changed."""

    names: tuple[str, ...]
    changed: Mapping[str, bytes]


@dataclass(frozen=True)
class SliceResult:
    """The run folder after a command on a node, and how the command ended."""

    files: Files | None  # None if no command was run
    code: int  # as in jobs.Ended
    error: str


def names_in(folder: Path) -> tuple[str, ...]:
    """The files of a run folder in the order of writing, without its lock and temporary files."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")]
    return tuple(sorted((name for name in names if name != LOCK), key=lambda name: WRITE_ORDER.get(name, 1)))


def stamps(folder: Path) -> dict[str, object]:
    """A value for each file that changes with every write, since files are replaced or extended."""
    stats = {name: (folder / name).stat() for name in names_in(folder)}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def pack(folder: Path, sent: Mapping[str, object] | None = None) -> Files:
    """The files of a run folder; those whose stamps are in `sent` are unchanged and come without contents."""
    current = stamps(folder)
    changed = [name for name in current if not sent or sent.get(name) != current[name]]
    return Files(tuple(current), {name: (folder / name).read_bytes() for name in changed})


def unpack(files: Files, folder: Path) -> None:
    """Update `folder` to these files: replace changed files atomically, then remove files that are gone.

    If this is interrupted at any point, the run still resumes to the same result. Raises MamlctlError before
    anything is written if a name leads out of the folder.
    """
    for path in map(PurePosixPath, files.names):
        if path.is_absolute() or ".." in path.parts:
            raise MamlctlError(f"a node sent a file called {path}", hint="use a cluster that you trust")
    for name in files.names:
        if name in files.changed:
            with replacing(folder / name) as file:
                file.write(files.changed[name])
    for name in set(names_in(folder)) - set(files.names):
        (folder / name).unlink()


class WorkerSlot:
    """A job's slot on a node: a temporary folder, and the command that runs in it.

    Its methods may be called from several threads.
    """

    def __init__(self, job: Job, cpus: float, version: str) -> None:
        """Create the folder.

        Args:
            job: the job.
            cpus: CPUs of the slot, which limit the threads of its commands.
            version: the version of mamlctl that has started the slot.
        """
        self._job, self._version = job, version
        self._threads = max(int(cpus), 1)
        _remove_abandoned_slots()
        self._slot = Path(tempfile.mkdtemp(prefix=SLOT_FOLDER))
        self._lock = FileLock(self._slot / SLOT_LOCK, thread_local=False)
        self._lock.acquire()
        self._folder = self._slot / job.folder.name
        self._sent: dict[str, object] = {}  # stamps of the files that the driver has
        self._child: ChildProcess | None = None
        self._stopped_by, self._starting = 0, threading.Lock()

    def work(self, files: Files | None, time_limit: str) -> SliceResult:
        """Run one command, which trains for a limited time or tests.

        Args:
            files: the run folder; None to use it as the last slice left it on this node.
            time_limit: as `mamlctl train --time-limit` takes it.
        """
        if self._version != mamlctl.__version__:
            release = f"{socket.gethostname()} has mamlctl {mamlctl.__version__}"
            error = f"{release}, but the command is {self._version}: install one release everywhere"
            return SliceResult(None, ExitCode.FAILED, error)
        if files is not None:
            unpack(files, self._folder)
            self._sent = stamps(self._folder)
        command = self._job.train_command(self._folder, time_limit) or self._job.eval_command(self._folder)
        code, error = self._run(command or ())
        path = self._folder / COMMANDS
        if path.is_file():
            write_text(path, self._with_final_folder(read_text(path)))
        changed = pack(self._folder, self._sent)
        self._sent = stamps(self._folder)
        return SliceResult(changed, code, self._with_final_folder(error))

    def stop(self, number: int) -> None:
        """Pass a signal on to the running command and start no other; does not wait."""
        with self._starting:
            self._stopped_by = number
            if self._child is not None and self._child.process.poll() is None:
                self._child.stop(number)
                kill = threading.Timer(SAVE_S, self._child.process.kill)
                kill.daemon = True
                kill.start()

    def node(self) -> str:
        """Ray's id of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def leave(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._slot, ignore_errors=True)
        self._lock.release()

    def _run(self, command: Arguments) -> tuple[int, str]:
        """Run a command; return its exit code and error. After a stop, return the signal's code at once."""
        with self._starting:
            if self._stopped_by:
                return 128 + self._stopped_by, ""
            if not command:
                return ExitCode.OK, ""
            environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
            self._child = ChildProcess(command, environment, subprocess.DEVNULL)
        return self._child.wait()

    def _with_final_folder(self, text: str) -> str:
        """The text with the job's own folder in place of the temporary one here."""
        return text.replace(str(self._folder), shlex.quote(str(self._job.folder)))


def _remove_abandoned_slots() -> None:
    """Remove the unlocked folders on this node, whose processes were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{SLOT_FOLDER}*/{SLOT_LOCK}"):
        with suppress(OSError), FileLock(lock, timeout=0):  # it is locked, or belongs to another user
            shutil.rmtree(lock.parent, ignore_errors=True)
