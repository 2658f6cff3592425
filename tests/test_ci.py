"""The workflow of this repository, and the one of docs/ci.md: their targets exist and their scripts work."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import yaml
from helpers.pages import DOCS, code_blocks
from helpers.shared import ROOT
from helpers.table_cases import EVAL_ROW

from mamlctl.core.results import named

PAGE = (DOCS / "ci.md").read_text()


def steps_of(text):
    """The commands that the steps of a workflow run."""
    (job,) = yaml.safe_load(text)["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def targets(makefile):
    return set(re.findall(r"^(\w+):(?! *=)", makefile, re.MULTILINE))


def make(makefile, target, folder):
    """What `make -n TARGET` would run with this makefile."""
    (folder / "Makefile").write_text(makefile)
    done = subprocess.run(["make", "-n", target], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_workflow_runs_all_checks_on_the_oldest_and_the_newest_python():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert steps_of(text) == ["make check", "make smoke"]
    (job,) = yaml.safe_load(text)["jobs"].values()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [text.rpartition(" ")[2] for text in project["classifiers"] if ":: Python :: 3." in text]
    assert job["strategy"]["matrix"]["python"] == [named[0], named[-1]] == ["3.11", "3.14"]
    assert project["requires-python"] == f">={named[0]}"
    assert targets((ROOT / "Makefile").read_text()) >= {"check", "smoke"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_smoke_trains_and_guards_the_demo(tmp_path):
    lines = make((ROOT / "Makefile").read_text().replace("$(VENV)/installed", ""), "smoke", tmp_path)
    assert "mamlctl train --preset demo --out runs/smoke" in lines
    assert "mamlctl eval runs/smoke --split test --tasks 300 --fail-under 85" in lines


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_documented_workflow_uses_the_documented_targets(tmp_path):
    (makefile,) = code_blocks(PAGE, "make")
    (workflow,) = code_blocks(PAGE, "yaml")
    named = [word.removeprefix("make ") for word in steps_of(workflow) if word.startswith("make ")]
    assert set(named) == targets(makefile)
    for target in named:
        assert "--fail-under" in make(makefile, target, tmp_path)


def test_the_documented_script_reads_the_result(tmp_path):
    """On the document of `eval --json`, whose entries `named` makes."""
    (line,) = re.findall(r"^python (-c .+)$", PAGE, re.MULTILINE)
    document = {"results": [named(EVAL_ROW), named(replace(EVAL_ROW, score=0.95, kind="ensemble"))]}
    (tmp_path / "result.json").write_text(json.dumps(document))
    command = [sys.executable, *shlex.split(line)]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == "0.8927 0.0111\n"


@pytest.mark.parametrize(
    ("printed", "code", "passed_on"), [("{}", 0, 0), ("{}", 1, 0), ("", 1, 1), ("", 4, 4), ("", 130, 130)]
)
def test_the_documented_script_only_forgives_a_missed_limit(tmp_path, printed, code, passed_on):
    script = next(block for block in code_blocks(PAGE, "sh") if "guard.json" in block)
    stub = tmp_path / "mamlctl"
    stub.write_text(f"#!/bin/sh\nprintf '%s' '{printed}'\nexit {code}\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", "-ec", script]  # -e as in a step of a workflow
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == passed_on
    assert ("warning" in done.stdout) == (code == 1 and printed == "{}")
