"""The record: experiments are checked, runs continue after any interruption, and receipts fit their files."""

import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from helpers import preloaded
from helpers.generated_docs import table
from helpers.shared import ignore
from records import receipts, tables
from records.__main__ import seconds_until, show_left, without_receipt, work
from records.estimates import timed
from records.experiments import experiments, read_experiment
from records.receipts import DIGEST, digest, problems, text_of, without_times
from records.runs import Place, RecordedRun

from mamlctl.core.errors import ExitCode, SettingsError
from mamlctl.core.statistics import mean_ci95, over_seeds

TINY = """
preset: demo
settings: {filters: 4, inner_steps: 2, meta_batch_size: 2, epochs: 3, steps_per_epoch: 20,
           val_tasks: 8, report_every: 1}
test: {tasks: 8}
"""
CURVES = """
settings: {dataset: sinusoid, shots: 5, epochs: 5, steps_per_epoch: 4, val_tasks: 5}
seeds: [3, 4]
test: {tasks: 5}
published: ["maml, 1 step"]
"""

POLICIES = """
settings: {dataset: navigation, outer: pg, shots: 2, queries: 3, hidden: "4", meta_batch_size: 2, epochs: 1,
           steps_per_epoch: 1, val_tasks: 2}
seeds: [0, 1]
test: {tasks: 4}
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
    for stop, steps in enumerate((5, 21)):
        process = started(glyphs_root, "--only", "tiny", runs=f"runs{stop}")
        wait_for_steps(f"runs{stop}/tiny-s0/run", steps)
        process.send_signal(signal.SIGTERM)
        code, text = done(process)
        assert code == 143, text
        assert re.search(r"tiny +0 +begun +\d+/60 .*\nleft: 1 run, about \d+:\d\d on cpu\n", text), text
        assert not Path("receipts/tiny-s0.json").exists()
        shutil.copytree(f"runs{stop}", f"runs{stop + 1}")  # elsewhere
    code, text = done(started(glyphs_root, "--only", "tiny", runs="runs2"))
    assert code == 0, text
    ours, other = (json.loads(Path(name, "tiny-s0.json").read_text()) for name in ("receipts", "undisturbed"))
    assert without_times(ours) == without_times(other)
    assert [ours["training"]["slices"], other["training"]["slices"]] == [3, 1]
    assert [test["protocol"]["bn"] for test in ours["tests"]] == ["transductive", "running", "support"]
    assert [row["kind"] for row in ours["tests"][0]["results"]] == ["best", "ensemble"]
    assert [step for step, *_ in ours["validation"]["curve"]] == [20, 40, 60]
    validated_s = ours["training"]["validated_s"]
    assert list(validated_s) == ["20", "40", "60"]
    assert 0 < validated_s["20"] < validated_s["40"] < validated_s["60"] <= ours["training"]["wall_s"]
    assert problems(ours, read_experiment(Path("files/tiny.yaml"))) == []


@pytest.mark.process
def test_a_slice_ends_and_the_list_says_what_is_left(folder, glyphs_root):
    code, text = done(started(glyphs_root, "--list"))
    assert code == 0, text
    assert not list(Path("runs").glob("*-s*"))
    lines = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert "not begun" in lines["curves", "3"] and "0/20" in lines["curves", "4"]
    assert "0/60" in lines["tiny", "0"]
    assert re.search(r"\nleft: 3 runs, about \d+:\d\d on cpu\n", text)
    code, text = done(started(glyphs_root, "--only", "t*", "--slice", "0.1s"))
    assert code == 0, text
    assert "curves" not in text and "left: 1 run, about" in text


HERE = Place("cpu", None, "test")


def worked(experiment, **settings):
    """Work on an experiment in this process; return what `work` returned, and the seeds that are left."""
    chosen, runs, folder = [replace(experiment, **settings)], Path("runs"), Path("receipts")
    left = without_receipt(chosen, runs, folder)
    ended = work(left, HERE, seconds_until(0, None), folder, ignore)
    return ended, [run.seed for run in without_receipt(chosen, runs, folder)]


@pytest.fixture
def curves(folder):
    return read_experiment(Path("files/curves.yaml"))


def test_a_budget_of_time_ends_the_training(curves):
    config = replace(curves.config, epochs=10**6)
    ended, left = worked(curves, config=config, minutes=0.02, seeds=(3,))
    assert (ended, left) == (("", ExitCode.OK), [])
    training = json.loads(Path("receipts/curves-s3.json").read_text())["training"]
    assert 0 < training["meta_steps"] < 10**7
    assert training["wall_s"] >= 1.2


def test_a_run_that_was_begun_with_other_settings_is_not_continued(curves, capsys):
    worked(curves)
    changed = replace(curves, stated={**curves.stated, "minutes": 1}, seeds=(3,))
    assert worked(changed) == (("", ExitCode.FAILED), [3])
    show_left(without_receipt([changed], Path("runs"), Path("receipts")), HERE, Path("runs"), None)
    out, err = capsys.readouterr()
    assert re.search(r"curves +3 +begun with other settings +20/20 +not timed yet\n", out)
    assert "left: 0 runs, about 0:00 on cpu, and 1 without a time (make reproduce LIST=1)" in out
    assert "hint:  change curves.yaml, or remove that folder" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a run of seed 4"),
        ({"seed: 4": "seed: 3", "shots: 5": "shots: 6"}, "begun with other settings"),
    ],
)
def test_a_run_folder_from_elsewhere_is_not_taken_for_the_run(curves, capsys, changes, words):
    worked(curves)
    shutil.rmtree("runs/curves-s3")
    Path("receipts/curves-s3.json").unlink()
    shutil.copytree("runs/curves-s4", "runs/curves-s3")
    config = Path("runs/curves-s3/run/config.yaml")
    for old, new in changes.items():
        config.write_text(config.read_text().replace(old, new))
    assert worked(curves) == (("", ExitCode.FAILED), [3])
    assert words in (err := capsys.readouterr().err) and "or remove that folder" in err


def test_a_run_without_its_progress_is_not_continued(curves, capsys):
    worked(curves)
    Path("receipts/curves-s3.json").unlink()
    progress = Path("runs/curves-s3/progress.json")
    whole = progress.read_text()
    for damaged in ("", whole[:-9]):
        progress.write_text(damaged)
        assert worked(curves) == (("", ExitCode.FAILED), [3])
        assert "without progress.json" in capsys.readouterr().err
    progress.write_text(whole)
    assert worked(curves) == (("", ExitCode.OK), [])


def test_the_speed_on_another_machine_does_not_count(curves, capsys):
    config = replace(curves.config, epochs=10**6)
    longer = replace(curves, config=config, seeds=(3,))
    (run,) = without_receipt([longer], Path("runs"), Path("receipts"))
    run.train(HERE, 1.0, ignore)
    for moved, words in ((False, "left: 1 run, about"), (True, "about 0:00 on cpu, and 1 without a time")):
        if moved:
            progress = json.loads(Path("runs/curves-s3/progress.json").read_text())
            progress["slices"][0]["environment"]["device"] = "cuda:0 (NVIDIA H200)"
            Path("runs/curves-s3/progress.json").write_text(json.dumps(progress))
        show_left(without_receipt([longer], Path("runs"), Path("receipts")), HERE, Path("runs"), None)
        assert re.search(words, capsys.readouterr().out)


def test_a_start_without_data_is_not_a_slice(folder, capsys):
    experiment = read_experiment(Path("files/tiny.yaml"))
    experiment = replace(experiment, config=replace(experiment.config, dataset="mini-imagenet"), minutes=60)
    here = replace(HERE, data_root=str(folder))
    (left,) = without_receipt([experiment], Path("runs"), Path("receipts"))
    assert work([left], here, seconds_until(0, None), Path("receipts"), ignore) == ("", ExitCode.DATA)
    assert not Path("runs/tiny-s0/progress.json").exists()
    show_left([left], here, Path("runs"), ignore)
    out, _ = capsys.readouterr()
    assert "left: 0 runs, about 0:00 on cpu, and 1 without a time" in out


@pytest.mark.parametrize("stored", ["5", '{"stated": 1}', '{"step_s": 1.0, "test_s": 1.0}', "["])
def test_a_damaged_estimate_is_measured_again(curves, stored):
    times = timed(curves, HERE, Path("runs"), ignore)
    file = Path("runs/estimates.json")
    ((key, kept),) = json.loads(file.read_text()).items()
    assert timed(curves, HERE, Path("runs"), None) == kept and kept["step_s"] == times["step_s"]
    file.write_text(f'{{"{key}": {stored}}}')
    assert timed(curves, HERE, Path("runs"), None) == {}
    assert timed(curves, HERE, Path("runs"), ignore)["step_s"] > 0


@pytest.mark.process
@pytest.mark.parametrize("where", ["runs", "receipts"])
def test_a_folder_that_cannot_be_written_is_reported_before_training(folder, glyphs_root, where):
    Path("occupied").touch()
    other = {"runs": "runs", "folder": "receipts"} | {where.replace("receipts", "folder"): "occupied/folder"}
    code, text = done(started(glyphs_root, "--only", "tiny", **other))
    assert (code, "error: occupied/folder: Not a directory" in text) == (1, True), text
    assert not list(Path("runs").glob("*-s*"))


@pytest.mark.parametrize("name", ["summary.json", "tasks.csv"])
def test_a_damaged_test_stops_only_its_own_receipt_until_it_is_removed(curves, capsys, name):
    worked(curves)
    receipt = Path("receipts/curves-s3.json")
    whole = json.loads(receipt.read_text())
    (damaged,) = Path("runs/curves-s3/run/eval").glob(f"*/{name}")
    damaged.write_text(damaged.read_text()[:-5])
    for path in (receipt, Path("receipts/curves-s4.json")):
        path.unlink()
    assert worked(curves) == (("", ExitCode.FAILED), [3])
    assert "is damaged" in (err := capsys.readouterr().err) and "remove that folder" in err
    shutil.rmtree(damaged.parent)
    assert worked(curves) == (("", ExitCode.OK), [])
    assert without_times(json.loads(receipt.read_text())) == without_times(whole)


def test_a_run_of_another_process_is_skipped(curves):
    with RecordedRun(curves, 3, Path("runs")).writing():
        assert worked(curves) == (("", ExitCode.LOCKED), [3])


def test_a_receipt_counts_only_for_the_settings_of_its_file(curves):
    worked(curves)
    first, second = (receipts.valid_receipt(curves, seed, Path("receipts")) for seed in (3, 4))
    assert text_of(first) == Path("receipts/curves-s3.json").read_text()
    assert problems(first, curves) == []
    Path("files/curves.yaml").write_text(CURVES.replace("shots: 5", "shots: 10").replace("published", "#"))
    changed = read_experiment(Path("files/curves.yaml"))
    (problem,) = problems(first, changed)
    assert problem.startswith("settings: ") and "'shots': 10" in problem
    assert receipts.valid_receipt(changed, 3, Path("receipts")) is None
    short = {**first["training"], "meta_steps": 19}
    for part, text in (
        ({"seed": 5}, "the experiment has no seed 5"),
        ({"training": short}, "it has 19 of 20 meta-steps"),
        ({"tests": []}, "it was tested with the batch-norm modes []"),
        ({"experiment": "other"}, "it is not a receipt of this experiment"),
    ):
        other = {**first, **part}
        assert problems({**other, DIGEST: digest(other)}, curves) == [text]
    assert without_times(first) != without_times(second)


def test_a_receipt_that_was_edited_or_is_of_another_seed_does_not_count(curves):
    worked(curves)
    file, other = Path("receipts/curves-s3.json"), Path("receipts/curves-s4.json")
    text = file.read_text()
    number = str(json.loads(text)["tests"][0]["results"][0]["mse"])
    for edited in (text.replace(number, "0.25", 1), text.replace('"format": 1', '"format": 2'), text[:-9]):
        file.write_text(edited)
        assert receipts.valid_receipt(curves, 3, Path("receipts")) is None
    file.write_text(re.sub(r',\n "sha256".*', "", text))
    (problem,) = problems(json.loads(file.read_text()), curves)
    assert problem == "its sha256 is not the digest of its content"
    shutil.copyfile(other, file)
    assert receipts.valid_receipt(curves, 3, Path("receipts")) is None
    assert worked(curves) == (("", ExitCode.OK), [])
    assert file.read_text() == text


def test_tables_have_the_scores_of_receipts_or_say_not_run(curves):
    lines = tables.lines(Path("files"), Path("receipts"))
    cells = {row.split(" | ")[0]: row.split(" | ")[1:] for row in tables.results(table, lines).splitlines()}
    assert cells["| `curves`"] == ["20", "1", "not run", "not run", "0.67 (a) |"]
    assert "- a: MAML (Finn et al. 2017), row 'maml, 1 step'." in tables.results(table, lines)
    worked(curves, seeds=(3,))
    (line,) = (line for line in tables.lines(Path("files"), Path("receipts")) if line.receipts)
    best = line.receipts[0]["tests"][0]["results"][0]
    assert line.score("best") == f"{best['per_step'][1]:.3f} ± {best['per_step_ci95'][1]:.3f} (1 of 2 seeds)"
    worked(curves)
    (line,) = (line for line in tables.lines(Path("files"), Path("receipts")) if line.receipts)
    scores = [receipt["tests"][0]["results"][1]["per_step"][1] for receipt in line.receipts]
    mean, deviation = over_seeds(scores)
    assert line.score("ensemble") == f"{mean:.3f} ± {deviation:.3f} (2 seeds)"
    assert "`tiny` | not run | not run | not run |" in tables.modes(table, lines)
    assert tables.curves(table, [line]).count(" at 20 |") == 2


def test_the_table_of_policies_has_returns_whose_intervals_contain_those_of_the_mean_of_seeds(folder):
    for file in Path("files").glob("*.yaml"):
        file.unlink()
    Path("files/policies.yaml").write_text(POLICIES)

    def row():
        lines = tables.lines(Path("files"), Path("receipts"))
        assert "policies" not in tables.results(table, lines)
        assert [line.experiment.modes for line in lines] == [(None,)]
        return tables.returns(table, lines).splitlines()[-1].strip("| ").split(" | ")

    start = ["`policies`", "`pg`", "1"]
    assert row() == [*start, "0 of 2", "not run", "-", "-", "-"]
    worked(read_experiment(Path("files/policies.yaml")))
    cells = row()
    assert cells[:4] == [*start, "2"]
    scores_ST = []
    for seed in (0, 1):
        (file,) = Path("runs", f"policies-s{seed}").rglob("tasks.csv")
        scores_ST.append([float(line.split(",")[1]) for line in file.read_text().splitlines()[1:]])
    mean, half = mean_ci95([fmean(of_task) for of_task in zip(*scores_ST, strict=True)])
    shown, bound = map(float, cells[-1].split(" ± "))
    assert shown == pytest.approx(mean, abs=0.006)
    assert half <= bound + 0.006


def test_files_of_experiments_are_checked(folder):
    file = Path("files/wrong.yaml")
    for text, problem in (
        ("sedes: [0]", "unknown key 'sedes'"),
        ("settings: {shotz: 5}", "unknown setting 'shotz'"),
        ("settings: {seed: 5}", "sets seed in 'settings'"),
        ("test: {bn: running}", "sets bn in 'test'"),
        ("seeds: [1, 1]", "seeds is"),
        ("seeds: 3", "seeds is"),
        ("minutes: 0", "minutes is"),
        ("settings: 5", "settings is 5"),
        ("test: [tasks]", "test is"),
        ("preset: 5", "preset is 5"),
        ("published: maml++", r"published is maml\+\+"),
        ("settings: {device: cuda}", "sets device in 'settings'"),
        ("test: {data_root: here}", "sets data_root in 'test'"),
        ('published: ["maml++"]\nsettings: {ways: 7}', r"published row 'maml\+\+'"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=problem):
            read_experiment(file)
    with pytest.raises(SettingsError, match="there is no experiment 'curve'"):
        experiments(folder / "files", only="curve")
