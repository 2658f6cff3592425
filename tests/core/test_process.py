"""A process ends silently on Ctrl-C, and works without standard streams and without a terminal size."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.shared import ROOT

from mamlctl.core.errors import SettingsError
from mamlctl.core.lifeline import Lifeline
from mamlctl.core.process import SHOW_CURSOR, module_command, world

pytestmark = pytest.mark.process

INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

interrupted, number = sys.argv[1], int(sys.argv[2])

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder())
sys.argv = ["mamlctl", "train", "--dataset", "glyphs", "--device", "nowhere"]
runpy.run_module("mamlctl", run_name="__main__", alter_sys=True)
"""
INTERRUPTED_WORK = """
import os, signal, sys
from mamlctl.core.process import exit_at_once_on, prepare_process, raise_on_signals

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM if sys.argv[1] == "terminated" else signal.SIGINT)
        sum(range(1000))

prepare_process()
exit_at_once_on(signal.SIGTERM)
raise_on_signals()
try:
    if sys.argv[1] in ("deleted", "terminated"):
        Deleted()
    else:
        os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except SystemExit:
    print("cleaned up", flush=True)
    raise
except KeyboardInterrupt:
    print("cleaned up", flush=True)
    if sys.argv[1] == "twice":
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
"""


def ended(program, *words):
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("module", ["typer", "omegaconf", "mamlctl.cli.train", "torch", "torch.autograd"])
def test_ctrl_c_during_imports_is_silent(module):
    done = ended(INTERRUPTED_IMPORT, module, "2")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_during_imports_are_silent(number):
    done = ended(INTERRUPTED_IMPORT, "torch.autograd", str(int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


@pytest.mark.parametrize(
    ("when", "code"), [("working", 0), ("deleted", 0), ("terminated", 143), ("twice", 130)]
)
def test_signals_during_work_raise_and_a_second_ctrl_c_exits_at_once(when, code):
    done = ended(INTERRUPTED_WORK, when)
    assert (done.returncode, done.stdout, done.stderr) == (code, "cleaned up\n", "")


def test_an_exit_at_once_shows_the_cursor_of_a_terminal():
    terminal, stderr = os.openpty()
    command = [sys.executable, "-c", INTERRUPTED_WORK, "twice"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT).returncode == 130
    os.close(stderr)
    assert os.read(terminal, 100) == SHOW_CURSOR
    os.close(terminal)


def test_ctrl_c_stays_ignored_in_the_background():
    program = "import signal, mamlctl.core.process as p; p.prepare_process(); p.raise_on_signals(); "
    program += "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    words = ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, program]
    assert subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout == "True\n"


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_child_accepts_signals_that_its_parent_ignores(name):
    number = signal.Signals[f"SIG{name}"]
    program = "import os, signal, mamlctl.cli.child_process as c; c.accept_signals(); "
    program += f"os.kill(os.getpid(), {int(number)})"
    words = ["sh", "-c", f'trap "" {name}; exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + number, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_replaced(closed):
    program = "import os, sys, mamlctl.core.process as p; p.prepare_process(); print(1); "
    program += "[os.fstat(number) for number in range(3)]; print(2, file=sys.stderr, flush=True); "
    program += "sys.exit(3 + len(sys.stdin.read()))"
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    assert done.stdout == ("" if ">&- " in f" {closed} ".replace("2>&-", "") else "1\n")
    assert done.stderr == ("" if "2>&-" in closed else "2\n")


@pytest.mark.parametrize("columns", ["0", "", "00"])
def test_a_terminal_without_a_size_still_gets_output(columns):
    command = [sys.executable, "-m", "mamlctl", "--help"]
    environment = os.environ | {"COLUMNS": columns, "LINES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("wrong", [{"RANK": "2"}, {"RANK": "-1"}, {"RANK": "x"}, {"MASTER_PORT": "99999"}])
def test_wrong_variables_of_a_rank_are_named(monkeypatch, wrong):
    right = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in right.items():
        monkeypatch.setenv(name, value)
    assert world() == (1, 2)
    ((name, value),) = wrong.items()
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}={value}"):
        world()


def test_a_new_process_does_not_import_files_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("raise SystemExit('of the user')")
    command = [*module_command("mamlctl"), "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_second_process_takes_the_place_of_a_rank():
    first, second, other = (Lifeline(rank, 2, timeout_s=60, on_stuck=print) for rank in (0, 1, 1))
    address = {"hosts": ["127.0.0.1"], "port": first.listen("token"), "token": "token"}
    second.connect(**address)
    with pytest.raises(OSError, match="another program answers"):
        other.connect(**address)
    first.leave(0)
    second.leave(0)
