"""Each command in its own process, as a shell starts it; other files test what the commands do."""

import json
import subprocess
import sys

import pytest
from helpers.grid_cases import QUICK_WORDS

pytestmark = pytest.mark.smoke


def output_of(*words):
    """The JSON document that `mamlctl WORDS --json` prints."""
    command = [sys.executable, "-m", "mamlctl", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs_root):
    """A run, which is also the only cell of the grid in `test_ablate`, and the document of `train`."""
    run = tmp_path_factory.mktemp("smoke") / "grid" / "cells" / "inner_lr=0.1-s0"
    words = [*QUICK_WORDS, "--inner-lr", "0.1", "--data-root", glyphs_root]
    return run, output_of("train", *words, "--out", run)


def test_fetch(tmp_path):
    command = [sys.executable, "-m", "mamlctl", "fetch", "glyphs", "--data-root", tmp_path]
    subprocess.run(command, capture_output=True, check=True)
    assert [*tmp_path.glob("glyphs/*.npy")]


def test_train(trained):
    run, document = trained
    assert document["result"]["status"] == "finished"
    assert (run / "checkpoints" / "last.pt").is_file()


def test_eval(trained, glyphs_root):
    document = output_of("eval", trained[0], "--tasks", 6, "--data-root", glyphs_root)
    assert [row["tasks"] for row in document["results"]] == [6, 6]


def test_compare(trained):
    (row,) = output_of("compare", trained[0], "--tasks", 6)["rows"]
    assert row["label"] == "maml"


def test_ablate(trained, glyphs_root):
    """The cell is trained already, so `ablate` only starts a process that tests it on other tasks."""
    words = ["--grid", "inner_lr=0.1", "--seeds", 1, "--tasks", 7, "--data-root", glyphs_root]
    (row,) = output_of("ablate", *QUICK_WORDS, *words, "--out", trained[0].parents[1])["rows"]
    assert [cell["status"] for cell in row["cells"]] == ["finished"]
    assert (trained[0].parents[1] / "logs" / "inner_lr=0.1-s0.txt").read_text().startswith("$ mamlctl eval ")
