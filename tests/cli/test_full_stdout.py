"""Standard output on a full disk: an error of two lines names it, and the exit code is 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.grid_cases import QUICK_WORDS
from helpers.shared import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here"),
]

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
MAMLCTL = [sys.executable, "-m", "mamlctl"]
FACT = "error: cannot write to standard output: No space left on device"
HINT = "hint:  free disk space, or write to another place"


@pytest.fixture(scope="module")
def run(tmp_path_factory, glyphs_root):
    path = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", *QUICK_WORDS, "--out", path, "--data-root", glyphs_root]
    subprocess.run([*MAMLCTL, *map(str, words)], check=True, capture_output=True, cwd=ROOT)
    return path


@pytest.mark.parametrize("environment", [{"PYTHONUNBUFFERED": "1"}, {"PYTHONUNBUFFERED": ""} | ASCII])
@pytest.mark.parametrize(
    "words",
    [
        ["eval", "RUN", "--tasks", "4", "--quiet"],
        ["eval", "RUN", "--tasks", "4", "--quiet", "--json"],
        ["compare", "RUN", "--tasks", "4", "--quiet", "--csv"],
        ["ablate", "--print-commands", "--dataset", "glyphs"],
        ["train", "--print-config"],
        ["--version"],
        ["--help"],
    ],
)
def test_a_full_disk_below_stdout_is_an_error_that_names_it(run, words, environment):
    words = [str(run) if word == "RUN" else word for word in words]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*MAMLCTL, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
    assert (done.returncode, done.stderr.splitlines()) == (1, [FACT, HINT])
