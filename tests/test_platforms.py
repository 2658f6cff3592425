"""The package works without the modules, functions and signals of POSIX that Windows lacks."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.grid_cases import QUICK_WORDS
from helpers.shared import ROOT

from mamlctl.core.files import read_at
from mamlctl.engine.devices import device_problems

# Removes what Windows lacks from a Python process, before anything else is imported. Only asyncio is imported
# before, because Linux has a version of it that needs `os.sysconf`.
SITE_CUSTOMIZE = """
import asyncio, os, signal, sys, warnings

warnings.filterwarnings("ignore", "only soft file lock is available")  # filelock has others on Windows
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None  # so that its import raises ModuleNotFoundError
for name in (
    "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm pause "
    "pthread_kill pthread_sigmask setitimer sigwait"
).split():
    delattr(signal, name)
for name in (
    "O_NONBLOCK chown fork getegid geteuid getgid getpgid getpgrp killpg mkfifo pread pwrite "
    "sched_getaffinity setpgid setsid statvfs sysconf"
).split():
    delattr(os, name)
"""
# Imports every module of the package, prints their number, and runs `mamlctl` with the words of argv.
PROGRAM = """
import importlib, pkgutil, sys
import mamlctl

names = [module.name for module in pkgutil.walk_packages(mamlctl.__path__, "mamlctl.")]
names = [name for name in names if "triton" not in name]  # Triton has no package for Windows
for name in names:
    importlib.import_module(name)
print(len(names), file=sys.stderr)
sys.argv[0] = "mamlctl"
sys.modules["mamlctl.__main__"].run()
"""


@pytest.fixture
def like_windows(tmp_path):
    """A function that runs a command in a Python that lacks what Windows lacks, as do its child processes."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def call(*words):
        command = [sys.executable, "-c", PROGRAM, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    return call


@pytest.mark.process
def test_every_module_and_command_works_without_posix(like_windows, tmp_path, glyphs_root):
    run = tmp_path / "run"
    done = like_windows("train", *QUICK_WORDS, "--data-root", glyphs_root, "--out", run)
    notice = (
        "on this system only Ctrl-C saves a run; ended in another way, it resumes from its last checkpoint"
    )
    assert done.stderr.count(notice) == 1
    assert int(done.stderr.splitlines()[0]) > 100, "every module was imported"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert not [path for path in run.rglob(".*") if path.is_file()], "no temporary file is left"
    done = like_windows("eval", run, "--tasks", 6, "--json")
    assert [row["tasks"] for row in json.loads(done.stdout)["results"]] == [6, 6]
    words = [*QUICK_WORDS, "--grid", "inner_lr=0.1", "--seeds", 1, "--tasks", 6, "--data-root", glyphs_root]
    done = like_windows("ablate", *words, "--out", tmp_path / "grid", "--json")
    assert [cell["status"] for cell in json.loads(done.stdout)["rows"][0]["cells"]] == ["finished"]


def test_reading_at_a_place_works_without_pread(tmp_path, monkeypatch):
    """Threads that share a file get their own bytes, and the position of the file stays."""
    data = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(data)
    places = [(7 * number % 10_000, 100) for number in range(300)]
    with path.open("rb") as file:
        assert file.read(3) == data[:3]
        monkeypatch.delattr(os, "pread")
        with ThreadPoolExecutor(8) as pool:
            parts = [*pool.map(lambda place: read_at(file, place[1], place[0]), places)]
        assert parts == [data[start : start + size] for start, size in places]
        assert file.read(3) == data[3:6]
        assert read_at(file, 100, len(data) - 10) == data[-10:]


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_apple_gpus_are_refused_with_the_reason(name):
    ((fact, hint),) = device_problems(name, "auto")
    assert fact.startswith(f"--device {name} is not supported: torch has no float64 and no second derivative")
    assert hint == "use --device cpu, or a CUDA device"
