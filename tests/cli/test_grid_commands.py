"""The `ablate` and `compare` commands as a user calls them."""

import csv
import io
import json
import os
import subprocess

import pytest
from helpers import preloaded
from helpers.grid_cases import QUICK_WORDS

pytestmark = pytest.mark.process
WORDS = [*QUICK_WORDS, "--seeds", "1", "--tasks", "12"]


def called(*words, code=0, **settings):
    command = [preloaded.python(), "-m", "mamlctl", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(autouse=True)
def without_pictures(compared, monkeypatch):
    """Skip pictures in all reports but the first, to save time."""
    monkeypatch.setenv(preloaded.NO_PICTURES, "1")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, glyphs_root):
    """The folder of two algorithms that were trained and compared, and the output."""
    out = tmp_path_factory.mktemp("tables") / "out"
    words = [word for word in WORDS if word not in ("--algo", "maml")]
    done = called("compare", "--algos", "protonet,maml", *words, "--data-root", glyphs_root, "--out", out)
    return out, done


def test_algorithms_are_trained_and_compared(compared):
    out, done = compared
    assert "protonet" in done.stdout
    assert "difference" in done.stdout
    assert "protonet, seed 0: done" in done.stderr
    assert done.stderr.strip().endswith(f"report  {out}/report.html")
    files = {path.name for path in out.iterdir()}
    assert files >= {
        "plan.yaml",
        "cells",
        "logs",
        "plots",
        "table.json",
        "table.csv",
        "table.md",
        "table.tex",
    }


def test_every_format_has_the_same_numbers(compared):
    """All cells are finished, so every format is printed from the stored table."""
    out, _ = compared
    document = json.loads(called("ablate", "--resume", out, "--json").stdout)
    assert [row["label"] for row in document["rows"]] == ["protonet", "maml"]
    stored = json.loads((out / "table.json").read_text())
    assert document["rows"] == stored["rows"]
    lines = list(csv.DictReader(io.StringIO(called("ablate", "--resume", out, "--csv").stdout)))
    assert [float(line["best_mean"]) for line in lines] == [row["best"]["mean"] for row in document["rows"]]
    for words, ending in (("--markdown", "md"), ("--latex", "tex")):
        assert called("ablate", "--resume", out, words).stdout == (out / f"table.{ending}").read_text()


def test_sort_orders_the_rows(compared):
    out, _ = compared
    rows = json.loads(called("compare", out, "--tasks", "12", "--json", "--sort", "row").stdout)["rows"]
    assert [row["label"] for row in rows] == ["maml", "protonet"]


def test_the_printed_commands_fill_the_cells(tmp_path, glyphs_root):
    """Run the tasks of the array script one by one, as SLURM would; `ablate` then has nothing left to do."""
    words = [*WORDS, "--grid", "inner_lr=0.1,0.4", "--data-root", glyphs_root]
    script = called("ablate", *words, "--slurm", cwd=tmp_path).stdout
    lines = called("ablate", *words, "--print-commands", cwd=tmp_path).stdout.splitlines()
    assert list(tmp_path.iterdir()) == []
    assert len(lines) == 2
    assert "#SBATCH --array=0-1" in script
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mamlctl").write_text(f'#!/bin/sh\nexec {preloaded.python()} -m mamlctl "$@"\n')
    (tmp_path / "bin" / "mamlctl").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for task in ("0", "1", "1"):  # a queue may start a job twice
        environment = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    done = called("ablate", *words, "--json", cwd=tmp_path)
    assert "training" not in done.stderr
    assert [len(row["cells"]) for row in json.loads(done.stdout)["rows"]] == [1, 1]
    assert all(row["best"] for row in json.loads(done.stdout)["rows"])


def test_a_dry_run_prints_cells_and_time_and_writes_nothing(tmp_path, glyphs_root):
    words = [*WORDS, "--grid", "inner_lr=0.1,0.4", "--data-root", glyphs_root, "--dry-run"]
    assert "2 cells, 12 meta-steps: about " in called("ablate", *words, cwd=tmp_path).stdout
    document = json.loads(called("ablate", *words, "--json", cwd=tmp_path).stdout)
    assert (document["cells"], document["meta_steps"]) == (2, 12)
    assert document["seconds"] == pytest.approx(
        sum(row["train_s"] + row["test_s"] for row in document["rows"])
    )
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_saves_and_prints_how_to_resume(tmp_path, glyphs_root):
    words = ["ablate", *WORDS, "--grid", "inner_lr=0.1,0.4", "--epochs", "5000", "--data-root", glyphs_root]
    done = called(*words, "--time-limit", "4s", "--out", tmp_path / "o")
    assert f"2 cells left; resume with: mamlctl ablate --resume {tmp_path / 'o'}" in done.stderr
    status = json.loads((tmp_path / "o/cells/inner_lr=0.1-s0/status.json").read_text())
    assert status["status"] == "interrupted"


def test_missing_data_are_reported_once(tmp_path):
    done = called(
        "ablate", "--dataset", "omniglot", "--offline", "--data-root", tmp_path, code=3, cwd=tmp_path
    )
    assert done.stderr.count("error: ") == 1
    assert "mamlctl fetch omniglot" in done.stderr
    assert list(tmp_path.iterdir()) == []
