"""One concept, one table: an improvement, an algorithm and a data set each take one entry.

A copy of the package gets one entry of each kind; its commands then show, check, plan, train, test and
compare them without a further edit. (`report/test_columns.py` does the same for a column of the table.)
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.shared import ROOT

pytestmark = pytest.mark.process

# Kind of entry -> the file that gets it, the line in front of which it stands, the entry.
ENTRIES = {
    "improvement": (
        "settings/schema.py",
        "    ca: bool = improvement(\n",
        '    fake: bool = improvement("Fake improvement.", unsupported_by=("no unrolled loop",))\n',
    ),
    "algorithm": (
        "engine/algorithms/registry.py",
        '    "anil": Algorithm(\n',
        '    "fakeml": Algorithm("Fake et al. 2026", _unrolled, unrolls=True),\n',
    ),
    "data set": (
        "data/sets/registry.py",
        '    "glyphs": DataSet(\n',
        """    "fakeset": DataSet(
        name="fakeset",
        summary="a fake set",
        licence="MIT",
        origin="nowhere",
        download_bytes=0,
        image_shape_CHW=(1, glyphs.SIDE, glyphs.SIDE),
        split_schemes=glyphs.SPLIT_SCHEMES,
        rotations="augment",
        ink=1,
        normalize="none",
        prepare=glyphs.prepare,
        open_pack=glyphs.open_pack,
        split_classes=glyphs.split_classes,
        is_here=glyphs.is_here,
        folder="glyphs",
    ),
""",
    ),
}
SIZES = ["--filters", "2", "--inner-steps", "1", "--meta-batch-size", "1", "--val-tasks", "2"]
SIZES += ["--epochs", "1", "--steps-per-epoch", "1", "--device", "cpu", "--quiet"]
TRAIN = ["train", "--dataset", "fakeset", "--algo", "fakeml", *SIZES]
COMMANDS = {
    "help": ["train", "--help"],
    "list": ["fetch", "--list"],
    "unsupported": ["train", "--dataset", "fakeset", "--algo", "protonet", "--fake"],
    "wrong algorithm": ["train", "--algo", "fakem"],
    "wrong data set": ["train", "--dataset", "fakese"],
    "plan": ["ablate", "--dataset", "fakeset", "--seeds", "1", "--out", "grid", "--print-commands"],
    "train": [*TRAIN, "--out", "plain"],
    "train with": [*TRAIN, "--fake", "--out", "with"],
    "eval": ["eval", "plain", "--tasks", "2", "--quiet"],
    "eval with": ["eval", "with", "--tasks", "2", "--quiet"],
    "compare": ["compare", "plain", "with", "--tasks", "2", "--out", "table"],
}
# Runs the commands of its first argument in one process, and prints the exit code and output of each.
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
    """A folder with a package that has one entry more of each kind, and what its commands answered there."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "mamlctl", folder / "mamlctl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "presets", folder / "presets")
    for file, line, entry in ENTRIES.values():
        path = folder / "mamlctl" / file
        before, found, after = path.read_text().partition(line)
        assert found
        path.write_text(before + entry + line + after)
    commands = {
        name: [*words, *(["--data-root", str(glyphs_root)] if words[0] in ("train", "eval") else [])]
        for name, words in COMMANDS.items()
    }
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
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
    assert "--no-fake" in text and "Fake improvement." in text
    assert "fakeml" in text
    assert "fakeset" in text
    assert "a fake set" in ended["list"][1]


def test_new_entries_are_checked(changed):
    _, ended = changed
    code, text = ended["unsupported"]
    assert code == 2
    assert "--fake has no effect with --algo protonet" in text
    assert ended["wrong algorithm"][0] == 2 and "did you mean 'fakeml'?" in ended["wrong algorithm"][1]
    assert ended["wrong data set"][0] == 2 and "did you mean 'fakeset'?" in ended["wrong data set"][1]


def test_plans_have_a_row_for_a_new_improvement(changed):
    _, ended = changed
    code, text = ended["plan"]
    assert code == 0
    alone = [line for line in text.splitlines() if "cells/maml+fake-s0" in line]
    assert len(alone) == 1 and " --fake " in alone[0]
    assert len(text.splitlines()) == 10  # maml, maml++, six improvements, the group of two, and the new one


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
    assert "fakeml + fake" in text
    assert "fakeset" in text or form == "csv"  # whose rows do not repeat what all of them share
