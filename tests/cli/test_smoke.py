"""Each command in a process of its own, as a shell starts it; other files test what the commands do."""

import json
import subprocess
import sys

import pytest
from helpers.grid_cases import QUICK_WORDS

pytestmark = pytest.mark.smoke


def output_of(*words):
    """What `mamlctl WORDS --json` prints."""
    command = [sys.executable, "-m", "mamlctl", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs_root):
    """A run, and what `train` printed."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    return run, output_of("train", *QUICK_WORDS, "--data-root", glyphs_root, "--out", run)


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


def test_ablate(tmp_path, glyphs_root):
    words = ["--grid", "inner_lr=0.1", "--seeds", 1, "--tasks", 6, "--data-root", glyphs_root]
    (row,) = output_of("ablate", *QUICK_WORDS, *words, "--out", tmp_path / "grid")["rows"]
    assert [cell["status"] for cell in row["cells"]] == ["finished"]
