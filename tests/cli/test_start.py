"""What a command shows, and what it imports, before the work starts."""

import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from helpers.shared import ROOT

from mamlctl.cli.app import COMMANDS
from mamlctl.run_folder import new_run
from mamlctl.settings.schema import TrainConfig

pytestmark = pytest.mark.process

# Commands that end before anything is computed.
SHORT = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
SHORT += ["nothing", "train --nothing", "train --ways x", "fetch --list", "train --print-config"]
SHORT += ["train --dataset nothing", "train --dataset glyphs --msl --inner-steps 1", "train --time-limit x"]
SHORT += ["train --resume nothing", "eval nothing", "ablate --plan nothing", "compare", "fetch nothing"]
SHORT += [
    "ablate --dataset glyphs --print-commands",
    "compare --algos maml,nothing",
    "ablate --resume nothing",
]
SHORT_PROGRAM = """
import io, sys
from contextlib import redirect_stdout, redirect_stderr, suppress
from mamlctl.cli.app import main
for line in sys.argv[1:]:
    sys.argv = ["mamlctl", *line.split()]
    with suppress(SystemExit), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        main()
    assert out.getvalue() or "error: " in err.getvalue(), line
    assert "torch" not in sys.modules, line
"""

# Runs the command line in its arguments until torch would be imported.
UNTIL_TORCH = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(2, b"<torch>")
            os._exit(0)

sys.meta_path.insert(0, Finder())
runpy.run_module("mamlctl", run_name="__main__", alter_sys=True)
"""
FIRST_LINES = {
    "train --dataset glyphs": "training maml++ on glyphs 5-way 1-shot",
    "train --dataset sinusoid": "training maml on sinusoid 10-shot",
    "train --resume RUN": "resuming RUN",
    "eval RUN --tasks 7": "testing RUN on 7 tasks",
    "eval RUN --support mine --save-adapted file": "adapting RUN to mine",
    "eval TABLE --support mine --query asked": "adapting TABLE to mine",
    "compare RUN": "comparing 1 run",
    "ablate --dataset glyphs --seeds 2 --out OUT": "9 rows, 18 cells, in OUT",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images, next to one on a table."""
    path = tmp_path_factory.mktemp("start") / "run"
    for name, config in (("run", TrainConfig()), ("table", TrainConfig(dataset="tasks.csv", net="mlp"))):
        with new_run(path.with_name(name), config, config, command="mamlctl train", environment={}):
            pass
    return path


def words(line, run):
    for word, name in (("RUN", "run"), ("TABLE", "table"), ("OUT", "grid")):
        line = line.replace(word, str(run.with_name(name)))
    return line


def shown(line, terminal, **variables):
    """What a command writes on stderr, a terminal or a pipe, until it imports torch."""
    reader, writer = os.openpty() if terminal else os.pipe()
    environment = os.environ | {"COLUMNS": "500", "TERM": "xterm"} | variables
    command = [sys.executable, "-c", UNTIL_TORCH, *line.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, cwd=ROOT, env=environment)
    os.close(writer)
    parts = list[bytes]()
    with suppress(OSError):  # Linux ends a terminal that has no writer with an error
        while part := os.read(reader, 4096):  # a terminal returns no more at once
            parts.append(part)
    os.close(reader)
    assert (done.returncode, done.stdout) == (0, b"")
    return b"".join(parts).decode()


def test_commands_that_end_at_once_do_not_import_torch(tmp_path):
    command = [sys.executable, "-c", SHORT_PROGRAM, *SHORT]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)


def test_the_version_is_printed_without_the_imports_of_any_command():
    program = """if True:
    import sys
    sys.argv = ["mamlctl", "--version"]
    from mamlctl.cli.app import main
    try:
        main()
    finally:
        print([name for name in ("numpy", "PIL", "omegaconf", "mamlctl.cli.train") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[1:] == ["[]"], done


@pytest.mark.parametrize("line", FIRST_LINES)
def test_the_work_is_named_on_a_terminal_before_torch_is_imported(line, run):
    text = shown(words(line, run), terminal=True)
    frame = text.rpartition("\x1b[2K")[2]  # the latest one, if other imports took long
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame)
    assert plain == f" {words(FIRST_LINES[line], run)}\r\n loading torch 0 s\r\n<torch>"


@pytest.mark.parametrize("words", ["--quiet", "--json"])
def test_the_work_is_not_named_where_no_progress_is_shown(words):
    assert shown(f"train --dataset glyphs {words}", terminal=True) == "<torch>"


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}])
def test_the_work_is_not_named_in_a_pipe(variables):
    assert shown("train --dataset glyphs", terminal=False, **variables) == "<torch>"
