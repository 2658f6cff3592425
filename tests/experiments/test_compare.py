"""Tests of comparisons: which runs can be compared, the names of rows, and scores like those of `eval`."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers.grid_cases import TESTED, filled, ignore, tiny_grid

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import write_json
from mamlctl.data.rules import with_figure
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.compare import compare
from mamlctl.report.export import document
from mamlctl.report.rendered_table import render_table
from mamlctl.report.report_folder import write_files
from mamlctl.settings.evaluation import EvalConfig

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def grid(tmp_path_factory, glyphs_root):
    """A grid of two algorithms with two seeds each, trained and tested."""
    grid = tiny_grid(tmp_path_factory.mktemp("compare") / "g", glyphs_root, "algo=maml,protonet")
    filled(grid)
    return grid


@pytest.fixture
def copied(grid, tmp_path):
    shutil.copytree(grid.folder, tmp_path / "g")
    return tmp_path / "g"


def called(paths, evaluate=TESTED, on_event=ignore, folder=None):
    command = "mamlctl compare"
    return compare(paths, evaluate, offline=True, command=command, on_event=on_event, folder=folder)


def test_run_folders_and_their_grid_give_the_same_table(grid):
    """Runs that are named one by one are joined into rows by their seeds."""
    runs = [grid.folder / "cells" / f"{algo}-s{seed}" for algo in ("maml", "protonet") for seed in (0, 1)]
    apart, whole = called(runs), called([grid.folder])
    assert [row.label for row in apart.rows] == ["maml", "protonet"]
    assert [row.best for row in apart.rows] == [row.best for row in whole.rows]
    stored = json.loads((grid.folder / "table.json").read_text())
    for row, expected in zip(document(whole)["rows"], stored["rows"], strict=True):
        assert row["best"] == expected["best"]
        assert row["ensemble"] == expected["ensemble"]
    assert any("inner steps" in note for note in whole.notes)  # protonet takes none


def test_the_report_has_curves_of_adaptation_and_a_plain_table_needs_none(copied, monkeypatch):
    monkeypatch.setattr("mamlctl.data.rules.FIGURE_TASKS", 4)
    test = EvalConfig(tasks=9)
    plain = called([copied], test)
    assert [row.best.per_step for row in plain.rows] == [(), ()] and plain.per_step_words == ""
    report = called([copied], with_figure(test))
    assert [row.best.per_step_tasks for row in report.rows] == [4, 4]
    assert [len(row.best.per_step) for row in report.rows] == [3, 1]
    assert report.per_step_words == ", first 4 of 9 tasks"
    assert [row.best.per_seed for row in report.rows] == [row.best.per_seed for row in plain.rows]
    events = []
    again = called([copied], test, events.append)
    assert not any("testing" in getattr(event, "text", "") for event in events)
    assert again.rows[0].best == plain.rows[0].best


def test_runs_are_named_relative_to_the_folder_of_the_table(copied, tmp_path, monkeypatch):
    """So that the links of a report lead to them, wherever the command was called."""
    monkeypatch.chdir(tmp_path)
    names = [f"g/cells/{algo}-s{seed}" for algo in ("maml", "protonet") for seed in (0, 1)]
    here = called([copied])
    assert [cell.run for row in here.rows for cell in row.cells] == names
    there = called([copied], folder=tmp_path / "tables" / "new")
    assert [cell.run for row in there.rows for cell in row.cells] == [f"../../{name}" for name in names]
    assert there.environment == here.environment != {}
    page = write_files(there, tmp_path / "tables" / "new")[-1]
    assert all((page.parent / cell.run).is_dir() for row in there.rows for cell in row.cells)


def test_a_table_of_single_checkpoints_has_no_column_for_ensembles(copied):
    table = called([copied], EvalConfig(tasks=9, models="best"))
    assert all(row.best and row.ensemble is None for row in table.rows)
    assert "ensemble" not in [column.key for column in render_table(table).columns]
    assert [row.best.per_seed for row in table.rows] == [
        row.best.per_seed for row in called([copied], EvalConfig(tasks=9)).rows
    ]


def test_only_runs_without_these_test_tasks_are_tested(copied):
    events = []
    table = called([copied], EvalConfig(tasks=9), events.append)
    assert sum("testing" in getattr(event, "text", "") for event in events) == 4
    direct = evaluate_run(copied / "cells" / "maml-s1", EvalConfig(tasks=9), offline=True, on_event=ignore)
    assert table.rows[0].best.per_seed[1] == pytest.approx(direct.rows[0].score, abs=1e-6)
    events.clear()
    assert called([copied], EvalConfig(tasks=9), events.append).rows[0].best == table.rows[0].best
    assert not any("testing" in getattr(event, "text", "") for event in events)


def edited(copied, name, **settings):
    """Change settings in the config.yaml of a run."""
    path = copied / "cells" / name / "config.yaml"
    lines = path.read_text().splitlines()
    for key, value in settings.items():
        assert any(line.startswith(f"{key}:") for line in lines)
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"ways": 5}, "--ways 5"),
        ({"shots": 2}, "--shots 2"),
        ({"queries": 3}, "--queries 3"),
        ({"split_seed": 7}, "--split-seed 7"),
        ({"eval_seed": 4}, "--eval-seed 4"),
    ],
)
def test_runs_with_other_tasks_are_refused_with_the_reason(copied, settings, fact):
    edited(copied, "protonet-s0", **settings)
    with pytest.raises(SettingsError) as refused:
        called([copied / "cells" / "maml-s0", copied / "cells" / "protonet-s0"])
    assert fact in refused.value.problems[0][0]
    assert refused.value.problems[0][1]


def test_runs_trained_on_other_tasks_are_compared_on_the_same_ones(copied):
    evaluate = replace(TESTED, ways=2, shots=2, queries=1)
    table = called([copied / "cells" / "maml-s0", copied / "cells" / "protonet-s0"], evaluate)
    assert (table.ways, table.shots, table.queries) == (2, 2, 1)
    assert all(row.best is not None and row.published == () for row in table.rows)
    edited(copied, "protonet-s0", ways=5)
    with pytest.raises(SettingsError) as refused:
        called([copied / "cells" / "maml-s0", copied / "cells" / "protonet-s0"])
    assert refused.value.problems[0][1] == "compare them separately, or add --ways"


def test_another_data_set_is_reported_alone(copied):
    edited(copied, "protonet-s0", dataset="omniglot", image_size=28, ways=4)
    with pytest.raises(SettingsError) as refused:
        called([copied / "cells" / "maml-s0", copied / "cells" / "protonet-s0"])
    ((fact, hint),) = refused.value.problems
    assert "has --dataset omniglot, but" in fact
    assert hint == "compare them separately"


def test_other_images_are_refused(copied):
    run = copied / "cells" / "protonet-s0"
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", environment | {"dataset_digest": "f" * 64})
    (run / "training_images.bin").write_bytes(bytes(80))
    with pytest.raises(SettingsError, match="was trained on data ffffffffffff"):
        called([copied / "cells" / "maml-s0", run])


def test_the_same_images_in_another_order_are_recognised(copied):
    run, first = (copied / "cells" / name for name in ("protonet-s0", "maml-s0"))
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", environment | {"dataset_digest": "f" * 64})
    fact = "protonet-s0 was trained on the images of .*maml-s0, but in another order"
    with pytest.raises(SettingsError, match=fact):
        called([first, run])


def test_changed_settings_of_a_tested_run_are_not_compared_under_its_scores(copied):
    config = copied / "cells" / "maml-s0" / "config.yaml"
    config.write_text(config.read_text().replace("inner_lr: 0.1", "inner_lr: 0.3"))
    with pytest.raises(MamlctlError, match="was written by a run with other settings"):
        called([copied / "cells" / "maml-s0", copied / "cells" / "protonet-s0"])


def test_a_run_whose_images_are_unknown_can_be_compared(copied):
    run = copied / "cells" / "protonet-s0"
    (run / "environment.json").unlink()
    assert called([copied / "cells" / "maml-s0", run]).rows[1].best is not None


def test_equal_labels_are_extended_by_the_settings_that_differ(copied):
    shutil.copytree(copied / "cells" / "maml-s0", copied / "other")
    (copied / "other" / "config.yaml").write_text(
        (copied / "other" / "config.yaml").read_text().replace("inner_lr: 0.1", "inner_lr: 0.3")
    )
    # An evaluation of an older version does not say which settings were tested.
    (summary,) = (copied / "other" / "eval").glob("*/summary.json")
    document = json.loads(summary.read_text())
    write_json(summary, {name: document[name] for name in document if name not in ("owner", "digest")})
    shutil.copytree(copied / "cells" / "maml-s0", copied / "twin")
    table = called([copied / "cells" / "maml-s0", copied / "other"])
    assert [row.label for row in table.rows] == ["maml, inner_lr=0.1", "maml, inner_lr=0.3"]
    table = called([copied / "cells" / "maml-s0", copied / "twin"])
    assert [row.label for row in table.rows] == [
        f"maml, {copied / path}" for path in ("cells/maml-s0", "twin")
    ]
    assert any("equal on every task" in note for note in table.notes)
    with pytest.raises(SettingsError, match="is named twice"):
        called([copied / "twin", copied / "." / "twin"])


def test_an_unfinished_run_gets_a_note(copied):
    run = copied / "cells" / "maml-s0"
    status = json.loads((run / "status.json").read_text())
    write_json(run / "status.json", status | {"status": "interrupted", "step": 4})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    table = called([run, copied / "cells" / "protonet-s0"])
    assert "maml-s0 stopped at meta-step 4 of 6" in table.notes
    assert table.rows[0].best is not None


def test_folders_without_runs_are_refused(tmp_path, copied):
    with pytest.raises(MamlctlError):
        called([tmp_path / "nothing"])
    shutil.rmtree(copied / "cells")
    with pytest.raises(MamlctlError, match="has no finished runs yet"):
        called([copied])


def test_a_grid_with_fewer_seeds_has_the_first_cells(grid):
    assert replace(grid, seeds=(0,)).cells == grid.cells[:2]
