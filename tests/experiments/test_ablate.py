"""Tests of a grid from its plan to its table: running, resuming, and refusing other settings."""

import csv
import json
import math
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers import preloaded
from helpers.grid_cases import QUICK_WORDS, TESTED, TINY, filled, ignore, tiny_grid, without_times

from mamlctl.core.errors import ExitCode, MamlctlError, SettingsError
from mamlctl.core.events import GridChanged
from mamlctl.core.files import is_locked
from mamlctl.core.statistics import difference, holm, mean_ci95
from mamlctl.experiments.grid import grid_folder
from mamlctl.experiments.grid.ablate import grid_table
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.grid_folder import load_grid, save_plan
from mamlctl.experiments.grid.plans import grid_rows
from mamlctl.experiments.train import train
from mamlctl.report.export import document
from mamlctl.run_folder import open_run, run_state
from mamlctl.settings.evaluation import EvalConfig

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def done(tmp_path_factory, glyphs_root):
    """Three rows with two seeds each, one of which diverges; the grid, its result and its events."""
    events = []
    grid = tiny_grid(tmp_path_factory.mktemp("grid") / "g", glyphs_root, "inner_lr=0.1,1e30,0.4")
    return grid, filled(grid, on_event=events.append, pictures=True), events


def copied(done, tmp_path):
    """A copy of the grid in another folder."""
    grid = done[0]
    shutil.copytree(grid.folder, tmp_path / "g")
    return load_grid(tmp_path / "g")


def scores_of(folder, column="best"):
    (path,) = folder.glob("eval/*/tasks.csv")
    with path.open() as file:
        return np.array([float(row[column]) for row in csv.DictReader(file)])


def test_a_row_averages_the_scores_of_its_runs(done):
    grid, result, _ = done
    first, diverged, last = result.table.rows
    assert [row.label for row in result.table.rows] == ["inner_lr=0.1", "inner_lr=1e30", "inner_lr=0.4"]
    cells = {cell.name: cell.folder for cell in grid.cells}
    ours = np.stack([scores_of(cells[f"inner_lr=0.4-s{seed}"]) for seed in (0, 1)])
    theirs = np.stack([scores_of(cells[f"inner_lr=0.1-s{seed}"]) for seed in (0, 1)])
    assert last.best.per_seed == tuple(ours.mean(1))
    assert (last.best.mean, last.best.ci95) == mean_ci95(ours.mean(0))
    assert last.best.deviation == pytest.approx(ours.mean(1).std(ddof=1))
    assert last.best.difference == difference(ours, theirs)
    assert first.best.difference is None
    assert last.best.p_holm == holm([last.best.difference.p])[0]
    assert first.ensemble_size == 2
    assert (diverged.best, diverged.divergences) == (None, 2)


def test_a_row_that_diverges_is_reported_and_the_others_finish(done):
    _, result, _ = done
    assert (result.failed, result.left, result.reason) == ({}, 0, "")
    cells = result.table.rows[1].cells
    assert {cell.status for cell in cells} == {"diverged"}
    assert all(cell.diverged_at >= 1 and cell.reason and "meta-step" not in cell.reason for cell in cells)
    assert {cell.status for row in result.table.rows[::2] for cell in row.cells} == {"finished"}


def test_a_cell_is_equal_to_a_run_of_train(done, tmp_path):
    grid = done[0]
    cell = grid.cells[-1]
    train(cell.config, out=tmp_path / "alone", offline=True, time_limit_s=None, command="", on_event=ignore)
    ours, alone = (
        torch.load(path / "checkpoints" / "best.pt", weights_only=True)["content"]["stored"]
        for path in (cell.folder, tmp_path / "alone")
    )
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in ours)


def test_a_second_call_changes_nothing_and_returns_the_same_table(done):
    grid, result, _ = done
    events = []
    before = {path: path.stat().st_mtime_ns for path in grid.folder.glob("cells/*/**/*.*")}
    again = filled(load_grid(grid.folder), on_event=events.append)
    assert not any(isinstance(event, GridChanged) for event in events)
    assert {path: path.stat().st_mtime_ns for path in grid.folder.glob("cells/*/**/*.*")} == before
    assert json.dumps(document(again.table)) == json.dumps(document(result.table))


def test_events_follow_each_cell_until_it_is_done(done):
    grid, _, events = done
    changes = [event for event in events if isinstance(event, GridChanged)]
    assert {len(event.cells) for event in changes} == {6}
    seen = {(cell.row, cell.seed, cell.state) for event in changes for cell in event.cells}
    for cell in grid.cells:
        end = "diverged" if "1e30" in cell.row.label else "done"
        assert (cell.row.label, cell.seed, "training") in seen
        assert (cell.row.label, cell.seed, end) in seen
    assert all(sum(cell.state in ("training", "testing") for cell in event.cells) <= 2 for event in changes)
    assert {cell.state for cell in changes[-1].cells} == {"done", "diverged"}


def test_other_seeds_and_test_tasks_keep_the_trained_cells(done, tmp_path):
    grid = copied(done, tmp_path)
    trained = [cell for cell in grid.cells if "1e30" not in cell.name]
    kept = {cell.name: (cell.folder / "checkpoints/best.pt").read_bytes() for cell in trained}
    more = tiny_grid(
        grid.folder,
        grid.rows[0].config.data_root,
        "inner_lr=0.1,1e30,0.4",
        seeds=(0,),
        evaluate=EvalConfig(tasks=7),
    )
    table = filled(more).table
    assert (table.tasks, len(table.rows[0].cells)) == (7, 1)
    assert table.rows[0].best.mean == pytest.approx(scores_at(more, 7).mean())
    for cell in trained:
        assert (cell.folder / "checkpoints/best.pt").read_bytes() == kept[cell.name]


def scores_at(grid, tasks):
    """The scores of the first cell; a shorter list of tasks is the beginning of a longer one."""
    for path in grid.cells[0].folder.glob("eval/*/tasks.csv"):
        lines = path.read_text().splitlines()
        if len(lines) == tasks + 1:
            return np.array([float(line.split(",")[1]) for line in lines[1:]])
    raise AssertionError


def test_cells_with_other_settings_are_never_mixed(done, tmp_path, glyphs_root):
    grid = copied(done, tmp_path)
    with pytest.raises(SettingsError, match=r"--meta-lr is 0\.5"):
        tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,1e30,0.4", meta_lr=0.5)
    with pytest.raises(SettingsError, match=r"has the row 'inner_lr=1e30', but .* plans 'inner_lr=0\.2'"):
        tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,0.2,0.4")
    with pytest.raises(SettingsError, match="has 3 rows, but this command plans 2") as refused:
        tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,0.4")
    assert f"mamlctl ablate --resume {grid.folder}" in refused.value.problems[0][1]
    (grid.folder / "plan.yaml").unlink()
    with pytest.raises(MamlctlError, match=r"no plan\.yaml"):
        tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,1e30,0.4")
    for extra in ("table.json", "table.csv", "table.md", "table.tex", "report.html"):
        (grid.folder / extra).unlink()
    shutil.rmtree(grid.folder / "plots")
    shutil.rmtree(grid.folder / "logs")
    with pytest.raises(SettingsError, match="was trained with meta_lr"):
        tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,1e30,0.4", meta_lr=0.5)
    assert tiny_grid(grid.folder, glyphs_root, "inner_lr=0.1,1e30,0.4").rows == grid.rows


def test_a_failed_cell_is_reported_and_tried_again(done, tmp_path):
    grid = copied(done, tmp_path)
    cell = grid.cells[0]
    whole = {path: path.read_bytes() for path in (cell.folder / "checkpoints").iterdir()}
    for path in whole:
        path.write_bytes(b"torn")
    shutil.rmtree(cell.folder / "eval")
    result = filled(grid)
    assert list(result.failed) == [cell.name]
    assert "last.pt" in result.failed[cell.name]
    assert result.left == 1
    for path, content in whole.items():
        path.write_bytes(content)
    again = filled(grid)
    assert (again.failed, again.left) == ({}, 0)
    assert without_times(document(again.table)) == without_times(document(done[1].table))


def test_a_table_names_the_checkpoint_that_was_used_for_a_damaged_one(done, tmp_path):
    grid = copied(done, tmp_path)
    cell = grid.cells[0]
    (cell.folder / "checkpoints/epoch-0001.pt").write_bytes(b"torn")
    shutil.rmtree(cell.folder / "eval")
    result = filled(grid)
    assert (result.failed, result.left) == ({}, 0)
    (note,) = result.table.notes
    assert "epoch-0001.pt cannot be read" in note and ": using " in note


def test_an_evaluation_from_before_the_end_of_training_does_not_count(done, tmp_path):
    grid = copied(done, tmp_path)
    (summary,) = grid.cells[0].folder.glob("eval/*/summary.json")
    old = json.loads(summary.read_text()) | {"step": 3}
    summary.write_text(json.dumps(old))
    table = grid_table(grid, {})
    assert len(table.rows[0].best.per_seed) == 1
    filled(grid)
    assert json.loads(summary.read_text())["step"] == 6


def test_two_calls_cannot_work_on_the_same_grid(done, tmp_path):
    from mamlctl.experiments.grid.grid_folder import lock_grid

    grid = copied(done, tmp_path)
    with lock_grid(grid), pytest.raises(MamlctlError, match="is in use by process"), lock_grid(grid):
        pass


def test_an_older_grid_on_curves_keeps_its_engine_unless_the_plan_names_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def planned(folder, **settings):
        given = {"dataset": "sinusoid", "algo": "maml"} | settings
        rows = resolve_rows(grid_rows(["inner_lr=0.01,0.02"]), [], given, 0)
        return grid_folder.open_grid(folder, "grid", rows, (0,), TESTED, "mamlctl ablate")

    def engines(grid):
        return [row.config.engine for row in grid.rows]

    assert engines(planned(None)) == ["compiled"] * 2
    older = planned(None, engine="adjoint")  # which was the default before curves were compiled
    save_plan(older)
    assert planned(None) == replace(older, rows=planned(older.folder).rows)
    assert engines(planned(older.folder)) == ["adjoint"] * 2
    with pytest.raises(SettingsError, match=r"--engine is compiled, but .* has adjoint"):
        planned(older.folder, engine="compiled")
    newer = planned(None, engine="compiled")
    assert newer.folder != older.folder
    save_plan(newer)
    assert planned(None).folder == newer.folder  # the folder of the current default comes first


@pytest.mark.parametrize(
    "text", ["", "[]", "format: 1", "rows: 3\nsettings: {}", "\x00", "settings: {foo: 1}\nrows: []"]
)
def test_a_damaged_plan_is_reported(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(MamlctlError):
        load_grid(tmp_path)


def test_a_plan_with_aliases_is_damaged_before_they_are_expanded(tmp_path):
    lists = ["a0: &a0 [x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    (tmp_path / "plan.yaml").write_text("\n".join([*lists, "plan: *a39", "format: 1"]))
    with pytest.raises(MamlctlError, match=f"{tmp_path}/plan.yaml is damaged: not YAML"):
        load_grid(tmp_path)


def test_a_plan_that_does_not_end_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(grid_folder, "MOST_CHARACTERS", 1000)
    (tmp_path / "plan.yaml").write_text("format: 1\n" + "# and so on\n" * 100)
    with pytest.raises(MamlctlError, match="is damaged"):
        load_grid(tmp_path)


def test_a_plan_with_an_infinite_seed_is_damaged(done, tmp_path):
    path = copied(done, tmp_path).folder / "plan.yaml"
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(document | {"seeds": [math.inf]}))
    with pytest.raises(MamlctlError, match="OverflowError"):
        load_grid(path.parent)


@pytest.mark.parametrize("folder", ["../elsewhere", "/tmp/elsewhere", "a/b"])
def test_a_plan_with_a_cell_outside_of_its_folder_is_damaged(done, tmp_path, folder):
    path = copied(done, tmp_path).folder / "plan.yaml"
    document = yaml.safe_load(path.read_text())
    document["rows"][0]["folder"] = folder
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(MamlctlError, match="is damaged: ValueError folder is"):
        load_grid(path.parent)


def test_a_plan_survives_saving_and_loading(done, tmp_path):
    grid = done[0]
    loaded = load_grid(grid.folder)
    assert loaded == grid
    save_plan(loaded)
    assert load_grid(grid.folder) == grid


def test_a_call_that_was_killed_while_writing_the_plan_can_be_repeated(tmp_path, glyphs_root):
    (tmp_path / "lock").touch()
    (tmp_path / ".plan.yaml.half").write_text("rows: ")
    assert len(tiny_grid(tmp_path, glyphs_root, "inner_lr=0.1,0.4").rows) == 2


# The call is killed as soon as such a file is written again; SIGKILL and SIGTERM alternate.
KILLS = (
    "lock",
    "plan.yaml",
    "cells/*/metrics.jsonl",
    "cells/*/checkpoints/*.pt",
    "cells/*/eval/*/summary.json",
)
RETURN_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: ExitCode.TERMINATED}


def newest(folder, pattern):
    """The time at which the newest such file was written, in ns; 0 if there is none."""
    return max((path.stat().st_mtime_ns for path in folder.glob(pattern)), default=0)


def wait_for_writers(folder):
    """Wait until the children of a killed call have saved their checkpoints and ended."""
    while any(is_locked(cell) for cell in folder.glob("cells/*")):
        time.sleep(0.005)


def test_a_grid_that_is_killed_at_any_moment_resumes_to_the_same_table(tmp_path, glyphs_root, monkeypatch):
    """SIGKILL leaves no time to clean up, and SIGTERM a little; the files must always suffice to resume."""
    monkeypatch.setenv(preloaded.NO_PICTURES, "1")
    words = ["ablate", *QUICK_WORDS, "--grid", "inner_lr=0.1,0.4", "--seeds", "1", "--tasks", "12"]
    words += ["--steps-per-epoch", "40", "--data-root", str(glyphs_root), "--json", "--workers", "2"]

    def call(out):
        with out.with_suffix(".json").open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
            return preloaded.Process(["-m", "mamlctl", *words, "--out", out], stdout, stderr)

    assert call(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    for number, pattern in enumerate(KILLS):
        wait_for_writers(killed)
        before = newest(killed, pattern)
        process = call(killed)
        while process.poll() is None and newest(killed, pattern) <= before:
            time.sleep(0.005)
        assert process.poll() is None, f"ended before {pattern} was written"
        sent = signal.SIGTERM if number % 2 else signal.SIGKILL
        process.send_signal(sent)
        assert process.wait() == RETURN_CODES[sent], pattern
    assert call(killed).wait() == 0
    whole, last = ((tmp_path / name).read_text() for name in ("whole.json", "killed.json"))
    assert without_times(json.loads(last)) == without_times(json.loads(whole))
    for cell in load_grid(tmp_path / "whole").cells:
        ours = open_run(killed / "cells" / cell.name)
        assert ours.metrics()[-1].get("val_accuracy") == open_run(cell.folder).metrics()[-1]["val_accuracy"]
        assert run_state(ours.path).status == "finished"


def test_the_words_contain_all_tiny_settings():
    assert len(QUICK_WORDS) == 2 * len(TINY)
    assert TESTED.tasks == 12
