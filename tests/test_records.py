"""The record: experiments are checked, runs continue after any interruption, and receipts fit their files."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import preloaded
from records.experiments import read_experiment
from records.receipts import problems, without_times

TINY = """
preset: demo
settings: {filters: 4, epochs: 3, steps_per_epoch: 20, val_tasks: 12, inner_steps: 2, report_every: 1}
test: {tasks: 12}
"""
CURVES = """
settings: {dataset: sinusoid, shots: 5, epochs: 2, steps_per_epoch: 10, val_tasks: 5}
seeds: [3, 4]
test: {tasks: 5}
published: ["maml, 1 step"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with two experiments in `files`."""
    monkeypatch.chdir(tmp_path)
    Path("files").mkdir()
    Path("files/tiny.yaml").write_text(TINY)
    Path("files/curves.yaml").write_text(CURVES)
    return tmp_path


def started(root, *words, runs="runs", folder="receipts"):
    """A process of the tool, with its output in two files."""
    where = ["--experiments", "files", "--runs", runs, "--receipts", folder, "--data-root", str(root)]
    with Path("out.txt").open("wb") as out, Path("err.txt").open("wb") as err:
        return preloaded.Process(["-m", "records", *where, *words], out, err)


def done(process):
    """The exit code of a process and what it printed."""
    return process.wait(), Path("out.txt").read_text() + Path("err.txt").read_text()


def wait_for_steps(run, steps, timeout_s=60):
    """Wait until a run has reported this many meta-steps."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        metrics = Path(run) / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"report"') >= steps:
            return
        time.sleep(0.01)
    pytest.fail(f"{run} has not reported {steps} meta-steps")


@pytest.mark.process
def test_a_run_that_is_stopped_twice_and_moved_has_the_receipt_of_an_undisturbed_one(folder, glyphs_root):
    code, text = done(started(glyphs_root, "--only", "tiny", runs="other", folder="undisturbed"))
    assert code == 0, text
    assert "nothing is left" in text
    for stop, steps in enumerate((5, 30)):
        process = started(glyphs_root, "--only", "tiny", runs=f"runs{stop}")
        wait_for_steps(f"runs{stop}/tiny-s0/run", steps)
        process.send_signal(signal.SIGTERM)
        code, text = done(process)
        assert code == 143, text
        assert "begun" in text and "left: 1 run, about 0:0" in text
        assert not Path("receipts/tiny-s0.json").exists()
        shutil.copytree(f"runs{stop}/tiny-s0", f"runs{stop + 1}/tiny-s0")  # elsewhere
    code, text = done(started(glyphs_root, "--only", "tiny", runs="runs2"))
    assert code == 0, text
    ours, other = (json.loads(Path(name, "tiny-s0.json").read_text()) for name in ("receipts", "undisturbed"))
    assert without_times(ours) == without_times(other)
    assert [ours["training"]["slices"], other["training"]["slices"]] == [3, 1]
    assert [test["protocol"]["bn"] for test in ours["tests"]] == ["transductive", "running", "support"]
    assert [row["kind"] for row in ours["tests"][0]["results"]] == ["best", "ensemble"]
    assert [step for step, *_ in ours["validation"]["curve"]] == [20, 40, 60]
    assert problems(ours, read_experiment(Path("files/tiny.yaml"))) == []


@pytest.mark.process
def test_a_slice_ends_and_the_list_says_what_is_left(folder, glyphs_root):
    code, text = done(started(glyphs_root, "--list"))
    assert code == 0, text
    assert not list(Path("runs").glob("*-s*"))
    lines = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert "not begun" in lines["curves", "3"] and "0/20" in lines["curves", "4"]
    assert "0/60" in lines["tiny", "0"]
    assert "left: 3 runs, about 0:0" in text
    code, text = done(started(glyphs_root, "--only", "t*", "--slice", "0.1s"))
    assert code == 0, text
    assert "curves" not in text
    code, text = done(started(glyphs_root, "--only", "curves"))
    assert code == 0 and "nothing is left" in text
    receipt = json.loads(Path("receipts/curves-s4.json").read_text())
    assert [test["protocol"]["bn"] for test in receipt["tests"]] == ["none"]
    code, text = done(started(glyphs_root, "--list"))
    assert "left: 1 run, " in text
    Path("files/curves.yaml").write_text(CURVES.replace("[3, 4]", "[3]").replace("epochs: 2", "epochs: 3"))
    code, text = done(started(glyphs_root))
    assert code == 1
    assert "begun with other settings" in text
