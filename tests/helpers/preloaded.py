"""A Python that has already imported torch, for the many processes that train for six meta-steps.

Such a process spends nearly all of its CPU time on importing modules and freeing them at the end. A server
imports everything once and forks for each requested process, which has its own signals, streams, folder,
environment and exit code, like a newly started one. As a program, this file is the server, or it replaces
`python -m mamlctl ...` and passes signals on to the fork.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER = '#!/bin/sh\nexec "{python}" -SE "{file}" "{socket}" "$@"\n'
PRELOADED = [
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "scipy.special",
    "torch",
    "mamlctl.cli.ablate",
    "mamlctl.cli.app",
    "mamlctl.cli.compare",
    "mamlctl.cli.evaluate",
    "mamlctl.cli.fetch",
    "mamlctl.cli.train",
    "mamlctl.display.comparison_table",
    "mamlctl.display.displays",
    "mamlctl.display.run_results",
    "mamlctl.experiments.evaluate",
    "mamlctl.experiments.executors.local",
    "mamlctl.experiments.grid.ablate",
    "mamlctl.experiments.grid.compare",
    "mamlctl.experiments.grid.estimate",
    "mamlctl.experiments.train",
]
# The first lines of a program for `python -c` that imports mamlctl from PYTHONPATH, not the preloaded one.
IMPORT_AGAIN = """
import os, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "mamlctl"]:
    del sys.modules[name]
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
"""
NO_PICTURES = "TEST_WITHOUT_PICTURES"  # environment variable, see `without_pictures`
STOP_S = 30  # for processes that are still running when the session ends

_servers: list[subprocess.Popen] = []


@functools.cache
def python() -> str:
    """Start the server and return the path to use for sys.executable."""
    folder = Path(tempfile.mkdtemp(prefix="mamlctl-python-"))
    launcher = folder / "python"
    launcher.write_text(LAUNCHER.format(python=sys.executable, file=__file__, socket=folder / "socket"))
    launcher.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, "serve", str(launcher)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    server.stdout.readline()
    _servers.append(server)
    return str(launcher)


def stop():
    """Stop the server, so that the time of its processes counts as time of this process's children."""
    for server in _servers:
        server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
        server.kill()
        server.wait()
        server.stdout.close()
        shutil.rmtree(Path(python()).parent)


class Process:
    """A forked `python WORDS` with the main methods of `subprocess.Popen`; its output goes to files."""

    def __init__(self, words, stdout, stderr):
        connection = connected(Path(python()).with_name("socket"))
        with Path(os.devnull).open() as nothing:
            streams = [stream.fileno() for stream in (nothing, stdout, stderr)]
            self.pid, self._answers = ask(connection, [*map(str, words)], streams)
        self._connection, self.returncode = connection, None

    def poll(self):
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout_s=120):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout_s)[0]:
                raise TimeoutError(f"process {self.pid} is still running")
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def connected(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def ask(connection, words, streams):
    """Make the server fork `python WORDS`; return its process id and a file for its exit code."""
    request = json.dumps([words, str(Path.cwd()), dict(os.environ)]).encode()
    socket.send_fds(connection, [request], streams)
    answers = connection.makefile()
    return int(answers.readline()), answers


def launch(path, words):
    """Act as `python WORDS` towards the parent of this process."""
    words = words[1:] if words[:1] == ["-P"] else words  # the server has imported mamlctl already
    if words[:1] not in (["-m"], ["-c"]):
        os.execv(sys.executable, [sys.executable, *words])
    if words[1] == "mamlctl.cli.child_process" and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    pid, answers = ask(connected(path), words, [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(launcher):
    """Fork for each connection until stdin is closed; return True in forked processes, else False."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    sys.argv = ["mamlctl", "train", "--print-config"]  # to import what a command imports late
    with suppress(SystemExit), redirect_stdout(StringIO()):
        sys.modules["mamlctl.cli.app"].main()
    gc.freeze()  # so that the garbage collector of a fork skips these objects
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(Path(launcher).with_name("socket")))
    listener.listen()
    print(flush=True)  # noqa: T201
    sys.executable = launcher
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become_or_wait(connection)
            return True
        connection.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return False


def become_or_wait(connection):
    """Fork again: return in the requested process, and wait for it in the other one."""
    request, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    words, folder, environment = json.loads(request)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    # The fork sends its own id, because Python loses signals that arrive before the fork is ready.
    with suppress(OSError):
        connection.sendall(f"{os.getpid()}\n".encode())
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words[1:] if words[0] == "-m" else words


def without_pictures():
    """Leave the figures out of reports, because drawing them takes longer than the rest of a tiny grid."""
    from unittest.mock import patch  # not at the top, because each launcher runs this file

    return patch("mamlctl.report.html_page.pictures", lambda table: ())


def run():
    """Run the requested module, and exit without freeing all modules, which takes a second."""
    if NO_PICTURES in os.environ:
        without_pictures().start()
    try:
        if sys.argv[0] == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        launch(sys.argv[1], sys.argv[2:])
    elif serve(sys.argv[2]):
        run()
