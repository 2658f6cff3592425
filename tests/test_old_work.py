"""Run folders and grids written by commit 207ec7b can still be read, evaluated, resumed and compared."""

import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import preloaded
from helpers.grid_cases import filled
from helpers.shared import ignore

import mamlctl
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.ablate import grid_table
from mamlctl.experiments.grid.compare import compare
from mamlctl.experiments.grid.grid_folder import load_grid, open_grid
from mamlctl.experiments.grid.scheduler import pending_cells
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.train import resume
from mamlctl.report.rendered_table import missing_reason
from mamlctl.run_folder import FIRST_SETTINGS, open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.fields import INNER, setting
from mamlctl.settings.presets import load_file
from mamlctl.settings.rules import VALUE_TYPES, ValueType

STORED = Path(__file__).parent / "stored" / "207ec7b.tar.xz"
# Share of the 100 queries per stored accuracy that may change class through rounding on another machine.
ACCURACY_TOLERANCE = 0.03
MSE_TOLERANCE = 1e-3  # relative
TESTED = EvalConfig(tasks=20)
PER_STEP = replace(TESTED, per_step=True)  # as 207ec7b tested every run
FOLDER = "glyphs-5w1s-one-on-ce4920"  # the default folder name in 207ec7b for the stored grid


@pytest.fixture
def old(tmp_path, monkeypatch, glyphs_root):
    """The stored folders, with a data root at the relative path in their settings."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "207ec7b" / "data").symlink_to(glyphs_root)
    monkeypatch.chdir(tmp_path / "207ec7b")
    return tmp_path / "207ec7b"


@pytest.fixture
def old_images(old, glyphs_root):
    """The same, skipped (or failed under CI) if glyphs are not drawn with the pixels of the stored runs."""
    before = open_run(old / "maml++-glyphs").environment()["dataset_digest"]
    (described,) = (glyphs_root / "glyphs").glob("*.json")
    digest = json.loads(described.read_text())["digest"]
    if digest != before:
        reason = f"this Pillow draws glyphs of digest {digest:.12}; the stored runs learned {before:.12}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return old


def runs_in(folder):
    return sorted(path.parent for path in folder.rglob("config.yaml"))


def resumed(path):
    return resume(
        path, {}, offline=True, time_limit_s=None, command="mamlctl train --resume", on_event=ignore
    )


def assert_same_scores(row, stored):
    """Compare a row of an evaluation with a stored row of the same model."""
    metric, names = stored["metric"], ("tasks", "queries", "inner_steps", "bn", "model")
    assert {name: getattr(row, name) for name in names} == {name: stored[name] for name in names}
    assert list(row.epochs) == stored["epochs"]
    near = {"rel": MSE_TOLERANCE} if metric == "mse" else {"abs": ACCURACY_TOLERANCE}
    assert row.score == pytest.approx(stored[metric], **near)
    assert list(row.per_step) == pytest.approx(stored["per_step"], **near)


def test_stored_checkpoints_have_the_digests_of_their_runs(old):
    for path in runs_in(old):
        assert load_file(path / "config.yaml").keys() == FIRST_SETTINGS
        stored = torch.load(path / "checkpoints" / "last.pt", weights_only=True)
        assert stored["owner"] == open_run(path).owner


def test_every_run_opens_with_its_settings_status_and_metrics(old):
    paths = runs_in(old)
    assert len(paths) == 9
    for path in paths:
        run = open_run(path)
        assert run.config.device == "cpu" and run.environment()["git"]["commit"].startswith("207ec7b")
        assert (not run.metrics()) == (path.name == "diverged-sinusoid")


@pytest.mark.parametrize("name", ["maml++-glyphs", "maml-sinusoid"])
def test_evaluating_a_finished_run_gives_the_stored_numbers(name, old, request):
    if "glyphs" in name:
        request.getfixturevalue("old_images")
    receipt = json.loads((old / f"{name}.json").read_text())
    folder = old / receipt["folder"]
    before = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder)
    result = evaluate_run(old / name, PER_STEP, offline=True, on_event=ignore)
    assert result.folder == str(folder)  # the same protocol gives the same folder
    after = json.loads((folder / "summary.json").read_text())
    assert after["protocol"] == before["protocol"] and after["step"] == before["step"]
    metric = "mse" if "sinusoid" in name else "accuracy"
    for row, stored in zip(result.rows, receipt["results"], strict=True):
        assert_same_scores(row, stored | {"metric": metric})


def test_a_run_without_an_evaluation_can_be_evaluated(old_images):
    result = evaluate_run(old_images / "reptile-glyphs", TESTED, offline=True, on_event=ignore)
    assert [row.inner_steps for row in result.rows] == [3, 3] and result.notes == ()


@pytest.mark.parametrize("name", ["maml++-interrupted", "alpha-maml-interrupted", "sinusoid-interrupted"])
def test_an_interrupted_run_is_resumed_to_its_end(name, old, request):
    if "sinusoid" not in name:
        request.getfixturevalue("old_images")
    path = old / name
    done, before = open_run(path).state(), open_run(path).metrics()
    assert done.status == "interrupted"
    result = resumed(path)
    run = open_run(path)
    assert result.status == "finished" and result.step == run.config.total_steps > done.step
    metrics = run.metrics()
    assert metrics[: len(before)] == before  # reports before the checkpoint are kept and not repeated
    steps = [entry["step"] for entry in metrics]
    assert steps == sorted(steps) and steps[-1] == run.config.total_steps
    stored = torch.load(path / "checkpoints" / "last.pt", weights_only=True)
    assert stored["content"]["position"]["validated"] == run.config.epochs
    assert evaluate_run(path, TESTED, offline=True, on_event=ignore).notes == ()


@pytest.mark.process
def test_resuming_a_grid_keeps_its_finished_cells(old_images):
    grid = load_grid(old_images / "grid")
    stored = {row["label"]: row for row in json.loads((grid.folder / "table.json").read_text())["rows"]}
    assert len(grid.cells) == 18 and pending_cells(grid)
    shutil.rmtree(grid.folder / "cells" / "maml+da-s0" / "eval")
    table = grid_table(grid, {})
    begun = {"maml", "maml + da"}
    for row in table.rows:
        states = [cell.status for cell in row.cells]
        assert states == (["finished", "missing"] if row.label in begun else ["missing", "missing"])
        assert (row.best is not None) == (row.label == "maml")
    # Only the two cells that exist, to avoid training the other sixteen.
    small = replace(grid, rows=tuple(row for row in grid.rows if row.label in begun), seeds=(0,))
    kept = {path: path.stat().st_mtime_ns for path in small.cells[0].folder.rglob("*") if path.is_file()}
    trained = (small.cells[1].folder / "checkpoints" / "last.pt").stat().st_mtime_ns
    result = filled(small, workers=1)
    assert (result.failed, result.left) == ({}, 0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (small.cells[1].folder / "checkpoints" / "last.pt").stat().st_mtime_ns == trained
    for row in result.table.rows:
        for kind in ("best", "ensemble"):
            mean = stored[row.label][kind]["mean"]
            assert getattr(row, kind).mean == pytest.approx(mean, abs=ACCURACY_TOLERANCE)


def test_repeating_a_plan_finds_its_folder(old):
    grid = load_grid(old / "grid")
    again = open_grid(None, grid.plan, grid.rows, grid.seeds, grid.evaluate, grid.command)
    assert again.folder == old / "runs" / FOLDER


def test_compare_reads_runs_and_grids(old_images):
    paths = [old_images / "maml++-glyphs", old_images / "reptile-glyphs"]
    table = compare(paths, TESTED, offline=True, command="mamlctl compare", on_event=ignore)
    (receipt,) = (json.loads(path.read_text()) for path in [old_images / "maml++-glyphs.json"])
    first, second = table.rows
    assert first.label.startswith("maml++") and second.label.startswith("reptile")
    assert first.best.mean == pytest.approx(receipt["results"][0]["accuracy"], abs=ACCURACY_TOLERANCE)
    assert first.cells[0].validation[-1][0] == first.cells[0].steps == 12
    assert first.cells[0].rates and not second.cells[0].rates
    whole = compare([old_images / "grid"], TESTED, offline=True, command="", on_event=ignore)
    assert [row.label for row in whole.rows] == ["maml", "maml + da"]


def test_a_diverged_run_is_reported_with_its_meta_step(old):
    paths = [old / "maml-sinusoid", old / "diverged-sinusoid"]
    table = compare(paths, TESTED, offline=True, command="mamlctl compare", on_event=ignore)
    assert [row.divergences for row in table.rows] == [0, 1]
    assert table.rows[1].cells[0].steps == 0  # the last step without divergence
    assert missing_reason(table.rows[1]) == "diverged at meta-step 1"


@dataclass(frozen=True)
class LaterEvalConfig(EvalConfig):
    """The settings of an evaluation in a later version of the package, with one more setting."""

    temperature: float = setting(2.0, INNER, "A later setting.", above=0, before=1.0)


def test_a_stored_evaluation_is_found_by_all_of_its_settings(old, monkeypatch):
    """This includes a setting of a later version that exists only in the settings class."""
    types = VALUE_TYPES[EvalConfig] | {"temperature": ValueType(float, False, ())}
    monkeypatch.setitem(VALUE_TYPES, LaterEvalConfig, types)
    run = open_run(old / "maml-sinusoid")
    found = find_evaluation(run, TESTED)
    assert found.protocol == find_evaluation(run, LaterEvalConfig(tasks=20, temperature=1.0)).protocol
    changes = {"queries": 3, "disjoint": True, "label_permutations": 2, "dataset": "line", "eval_seed": 5}
    changes |= {"split": "val", "tasks": 21, "adapts": "all", "inner_steps": 3, "inner_lr": 0.5}
    changes |= {"checkpoint": "best.pt", "ways": 3, "shots": 5, "classes": "leaf"}
    without_effect = {"device": "cuda", "data_root": "elsewhere", "allow_overlap": True}
    without_effect |= {"models": "best", "per_step": True, "per_step_tasks": 5}  # parts of a stored test
    assert {item.name for item in fields(EvalConfig)} - changes.keys() == {"bn", *without_effect}
    for name, value in changes.items():
        assert find_evaluation(run, replace(TESTED, **{name: value})) is None, name
    assert find_evaluation(run, replace(TESTED, **without_effect)) is not None
    later = LaterEvalConfig(tasks=20)
    assert find_evaluation(run, later) is None
    evaluate_run(run.path, later, offline=True, on_event=ignore)
    assert find_evaluation(run, later).protocol == {**found.protocol, "temperature": 2.0}
    assert find_evaluation(run, TESTED).protocol == found.protocol


# A setting of a later version of the package, which older runs do not have.
LATER = """    unroll: int = setting(7, INNER, "A later setting.", least=0, before=3)
    inner_steps: int"""
RESUME_AND_PRINT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from mamlctl.core.errors import MamlctlError
from mamlctl.experiments.grid.grid_folder import load_grid, open_grid
from mamlctl.experiments.train import resume
from mamlctl.run_folder import RunFolder, open_run
path = Path("sinusoid-interrupted")
run = open_run(path)
owners = [RunFolder(path, replace(run.config, unroll=value)).owner for value in (3, 7)]
result = resume(path, {}, offline=True, time_limit_s=None, command="", on_event=lambda event: None)
config = path / "config.yaml"
before = config.read_text()
config.write_text(before + "unroll: 7\\n")
stored = open_run(path)
config.write_text(before + "unrol: 3\\n")
try:
    open_run(path)
except MamlctlError as error:
    refused = [error.message, error.hint]
grid = load_grid(Path("grid"))
again = open_grid(None, grid.plan, grid.rows, grid.seeds, grid.evaluate, grid.command)
facts = {"missing": run.config.unroll, "owners": [run.owner, *owners], "status": result.status}
facts |= {"set": stored.config.unroll, "owner_of_set": stored.owner, "refused": refused}
facts |= {"folder": again.folder.name, "in_grid": [cell.config.unroll for cell in grid.cells]}
print(json.dumps(facts))
"""


@pytest.mark.process
def test_a_setting_of_a_later_version_does_not_change_older_runs(old, tmp_path):
    """A copy of the package with one more field opens and resumes a run that lacks it."""
    shutil.copytree(Path(mamlctl.__file__).parent, tmp_path / "later" / "mamlctl")
    schema = tmp_path / "later" / "mamlctl" / "settings" / "schema.py"
    text = schema.read_text()
    assert text.count("    inner_steps: int") == 1
    schema.write_text(text.replace("    inner_steps: int", LATER, 1))
    today = open_run(old / "sinusoid-interrupted").owner
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "later"), "OMP_NUM_THREADS": "1"}
    words = [preloaded.python(), "-c", preloaded.IMPORT_AGAIN + RESUME_AND_PRINT]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["missing"], facts["status"]) == (3, "finished")
    owner, owner_of_old_value, owner_of_new_value = facts["owners"]
    assert owner == owner_of_old_value == today != owner_of_new_value
    assert (facts["set"], facts["owner_of_set"]) == (7, owner_of_new_value)
    assert "is damaged: unknown setting 'unrol'" in facts["refused"][0] and facts["refused"][1]
    assert facts["in_grid"] == [3] * 18 and facts["folder"] == FOLDER
