"""Stored evaluations: every damage is an error that names the folder, and never another table."""

import copy
import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.grid_cases import TESTED, tiny_grid
from helpers.shared import ignore

from mamlctl.core.errors import MamlctlError
from mamlctl.experiments.evaluate import evaluate_run
from mamlctl.experiments.grid.compare import compare
from mamlctl.experiments.grid.evaluation_files import read_scores, read_summary
from mamlctl.experiments.train import train
from mamlctl.report import export

WRONG = [None, True, 0, -1.5, 1e400, "x", [], {}, [[]], [None], [{}], ["x"], {"x": 1}, [1, "x"], 10**400]


@pytest.fixture(scope="module")
def tested(tmp_path_factory, glyphs_root):
    """A run with one evaluation: its folder, the evaluation's folder and the table."""
    path = tmp_path_factory.mktemp("tested") / "run"
    config = tiny_grid(path.parent / "grid", glyphs_root, "inner_lr=0.1,0.2", seeds=(0,)).cells[0].config
    train(config, out=path, offline=True, time_limit_s=None, command="mamlctl train", on_event=ignore)
    per_step = replace(TESTED, per_step=True)  # which has the most values
    folder = evaluate_run(path, per_step, offline=True, on_event=ignore).folder
    return SimpleNamespace(run=path, folder=path / "eval" / folder.split("/")[-1], table=table_of(path))


def table_of(path):
    table = compare([path], TESTED, offline=True, command="mamlctl compare", on_event=ignore)
    document = export.document(table, None)
    return json.dumps({name: document[name] for name in ("rows", "notes")}, sort_keys=True)


@pytest.fixture
def damaged(tested, tmp_path):
    """A copy of the run: its folder, the evaluation's folder and the table."""
    run = tmp_path / "run"
    shutil.copytree(tested.run, run)
    return SimpleNamespace(run=run, folder=run / "eval" / tested.folder.name, table=table_of(run))


def places(document, path=()):
    """The path to every value in a JSON document."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


def replaced(document, path, value):
    """A copy with another value at the path."""
    if not path:
        return value
    new = copy.deepcopy(document)
    *first, last = path
    inner = new
    for key in first:
        inner = inner[key]
    inner[last] = value
    return new


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_of_a_wrong_type_is_damage_that_names_the_folder(tested, tmp_path, signed):
    whole = json.loads((tested.folder / "summary.json").read_text())
    if not signed:  # as older versions wrote it
        del whole["digest"]
    shutil.copy(tested.folder / "tasks.csv", tmp_path)
    tried = 0
    for path in places(whole):
        for value in WRONG:
            text = json.dumps(replaced(whole, path, value))
            (tmp_path / "summary.json").write_text(text)
            try:
                summary = read_summary(tmp_path / "summary.json")
                scores = read_scores(tmp_path, summary)
            except MamlctlError as error:
                assert str(error).startswith(f"{tmp_path} is damaged: ")
                assert "\n" not in str(error)
                assert "remove that folder" in error.hint
                tried += 1
            else:
                for row in summary["results"]:
                    assert np.isfinite(scores[row["model"]]).all()
                    np.array([np.nan if each is None else each for each in row["per_step"]], dtype=float)
    assert tried > 300


@pytest.mark.parametrize("name", ["summary.json", "tasks.csv"])
def test_a_damaged_file_never_gives_another_table(damaged, name):
    path = damaged.folder / name
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(20):
        data = bytearray(whole)
        if draw.random() < 0.5:
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            assert table_of(damaged.run) == damaged.table
        except MamlctlError as error:
            assert str(error).startswith(f"{damaged.folder} is damaged: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tasks.csv", b"\0" * 200_000),
        ("tasks.csv", b""),
        ("summary.json", b"[" * 200_000),
        ("summary.json", b"[]"),
        ("summary.json", b'{"protocol": {}, "results": [{"model": 5}]}'),
    ],
)
def test_other_content_is_damage(damaged, name, content):
    (damaged.folder / name).write_bytes(content)
    with pytest.raises(MamlctlError, match="is damaged: ") as raised:
        table_of(damaged.run)
    assert "remove that folder" in raised.value.hint


def test_scores_without_a_line_or_with_another_order_of_lines_are_damage(damaged):
    summary = json.loads((damaged.folder / "summary.json").read_text())
    del summary["digest"]
    (damaged.folder / "summary.json").write_text(json.dumps(summary))
    path = damaged.folder / "tasks.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    for wrong in (lines[:-1], lines[::-1], [*lines, lines[-1]], []):
        path.write_text("".join([head, *wrong]))
        with pytest.raises(MamlctlError, match="lines of scores for 12 tasks"):
            table_of(damaged.run)


def test_scores_that_are_not_finite_are_read_again(damaged):
    summary = json.loads((damaged.folder / "summary.json").read_text())
    del summary["digest"]
    for row in summary["results"]:
        row["per_step"] = [None] * len(row["per_step"])
    (damaged.folder / "summary.json").write_text(json.dumps(summary))
    assert '"per_step": [null, null, null]' in table_of(damaged.run)


def test_testing_again_removes_what_a_killed_test_has_left(damaged):
    for name in (".tasks.csv.killed_1", ".summary.json.killed_2"):
        (damaged.folder / name).touch()
    evaluate_run(damaged.run, replace(TESTED, per_step=True), offline=True, on_event=ignore)
    assert {path.name for path in damaged.folder.iterdir()} == {"tasks.csv", "summary.json"}
