"""A process of mamlctl ends quickly, but not before everything that has to be done at its end."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.shared import ROOT

pytestmark = pytest.mark.process

SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mamlctl"]
STARTS = {
    "module": "runpy.run_module('mamlctl', run_name='__main__')",
    "script": f"EntryPoint('mamlctl', {SCRIPT!r}, 'console_scripts').load()()",
    "child": "child_process.run(Path('error.txt'))",
}
# A command that leaves a thread and an exit function behind. `Module` stands for what takes long to free.
PROGRAM = """
import atexit, runpy, sys, threading, time
from importlib.metadata import EntryPoint
from pathlib import Path

from mamlctl.cli import app, child_process

class Module:
    def __del__(self):
        print("freed")

def end_thread():
    time.sleep(0.2)
    print("thread")

def command(on_error=None):
    threading.Thread(target=end_thread).start()
    if sys.argv[1:] != ["silent"]:
        print("x" * 1_000_000)
    sys.exit(3)

module = Module()
atexit.register(print, "exit function")
app.main = command
"""


def ended(start, *words, **streams):
    command = [sys.executable, "-c", PROGRAM + STARTS[start], *words]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered, **streams)


@pytest.mark.parametrize("start", STARTS)
def test_code_output_threads_and_exit_functions_survive_a_quick_end(start):
    done = ended(start, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "x" * 1_000_000 + "\nthread\nexit function\n"


def test_output_that_cannot_be_flushed_is_reported_by_the_interpreter():
    with Path("/dev/full").open("w") as full:
        done = ended("module", "silent", stdout=full)
    assert done.returncode == 120
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_process_ends_is_silent(number):
    program = (
        PROGRAM + f"import os; atexit.register(os.kill, os.getpid(), {int(number)})\n" + STARTS["module"]
    )
    done = subprocess.run([sys.executable, "-c", program, "silent"], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + number, b"")
