"""A new data set, algorithm, improvement or table column needs one entry in one table.

These tests apply the diffs of contributing.md to a copy of the package; its commands must then show, check,
plan, train, test and compare the new entries without further edits.
"""

import json
import os
import shutil
import subprocess

import pytest
from helpers import preloaded
from helpers.pages import apply_diff, documented_diff
from helpers.shared import ROOT

pytestmark = pytest.mark.process

KINDS = ("data set", "algorithm", "improvement", "table column")
SIZES = ["--filters", "2", "--inner-steps", "1", "--meta-batch-size", "1", "--val-tasks", "2"]
SIZES += ["--epochs", "1", "--steps-per-epoch", "2", "--report-every", "1", "--device", "cpu", "--quiet"]
TRAIN = ["train", "--dataset", "turned-glyphs", "--algo", "maml-sgd", *SIZES]
COMMANDS = {
    "help": ["train", "--help"],
    "list": ["fetch", "--list"],
    "unsupported": ["train", "--dataset", "turned-glyphs", "--algo", "scratch", "--wu"],
    "no Adam": ["train", "--algo", "maml-sgd", "--adam-beta1", "0.5"],
    "wrong algorithm": ["train", "--algo", "maml-sg"],
    "wrong data set": ["train", "--dataset", "turned-glyph"],
    "plan": ["ablate", "--dataset", "turned-glyphs", "--seeds", "1", "--out", "grid", "--print-commands"],
    "train": [*TRAIN, "--out", "plain"],
    "train with": [*TRAIN, "--wu", "--out", "with"],
    "eval": ["eval", "plain", "--tasks", "2", "--quiet"],
    "eval with": ["eval", "with", "--tasks", "2", "--quiet"],
    "compare": ["compare", "plain", "with", "--tasks", "2", "--out", "table"],
}
# Runs the commands in its first argument in one process, and prints the exit code and output of each.
PROGRAM = """
import contextlib, io, json, sys
from mamlctl.cli.app import main
ended = {}
for name, words in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    sys.argv = ["mamlctl", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    ended[name] = code, out.getvalue()
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory, glyphs_root):
    """A folder with a copy of the package that has the new entries, and the output of its commands."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "mamlctl", folder / "mamlctl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "presets", folder / "presets")
    for kind in KINDS:
        apply_diff(documented_diff(f"Add {'an' if kind[0] in 'ai' else 'a'} {kind}"), folder)
    commands = {
        name: [*words, *(["--data-root", str(glyphs_root)] if words[0] in ("train", "eval") else [])]
        for name, words in COMMANDS.items()
    }
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(
        [preloaded.python(), "-c", preloaded.IMPORT_AGAIN + PROGRAM, json.dumps(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_help_and_lists_show_new_entries(changed):
    _, ended = changed
    code, text = ended["help"]
    assert code == 0
    assert "--no-wu" in text and "Warm-up: " in text
    assert "maml-sgd" in text
    assert "turned-glyphs" in text
    assert "the glyphs, with each quarter turn as a separate class" in ended["list"][1]


def test_new_entries_are_checked(changed):
    _, ended = changed
    code, text = ended["unsupported"]
    assert code == 2
    assert "--wu has no effect with --algo scratch" in text
    assert ended["no Adam"][0] == 2 and "its outer optimiser is plain SGD, not Adam" in ended["no Adam"][1]
    assert ended["wrong algorithm"][0] == 2 and "did you mean 'maml-sgd'?" in ended["wrong algorithm"][1]
    assert ended["wrong data set"][0] == 2 and "did you mean 'turned-glyphs'?" in ended["wrong data set"][1]


def test_plans_have_a_row_for_a_new_improvement(changed):
    _, ended = changed
    code, text = ended["plan"]
    assert code == 0
    alone = [line for line in text.splitlines() if "cells/maml+wu-s0" in line]
    assert len(alone) == 1 and " --wu " in alone[0]
    assert len(text.splitlines()) == 10  # maml, maml++, six improvements, the group of two, and the new one


def test_the_new_improvement_changes_training(changed):
    folder, _ = changed
    rates = {
        name: [
            json.loads(line)["meta_lr"]
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
            if "query_losses" in line
        ]
        for name in ("plain", "with")
    }
    assert rates == {"plain": [0.001, 0.001], "with": [0.0005, 0.001]}


@pytest.mark.parametrize("form", ["terminal", "csv", "json", "md", "tex", "html"])
def test_every_form_of_the_table_names_new_entries(changed, form):
    folder, ended = changed
    for name in ("train", "train with", "eval", "eval with", "compare"):
        assert ended[name][0] == 0, ended[name][1]
    if form == "terminal":
        text = ended["compare"][1]
    else:
        (path,) = (folder / "table").glob(f"*.{form}")
        text = path.read_text()
    assert "maml-sgd + wu" in text
    assert "runs done" in text or "runs_done" in text
    assert "turned-glyphs" in text or form == "csv"  # its rows omit the settings that all runs share
