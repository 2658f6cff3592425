"""Tests of what a table concludes from the settings of its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mamlctl.experiments.grid.build_table import RowSpec, RunReference, _changes, _equal_rows, _RowRuns
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.plans import improvement_rows
from mamlctl.experiments.grid.stored_evaluations import StoredEvaluation
from mamlctl.run_folder import RunFolder
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig


def changes(plan, algo):
    """The improvements that the label of each row adds to those of the first row, and removes from them."""
    layers, settings = [("test", {"dataset": "omniglot"})], {"algo": algo}
    rows = [
        RowSpec(row.label, row.config, ())
        for row in resolve_rows(improvement_rows(plan, algo), layers, settings, seed=0)
    ]
    return {row.label: _changes(row, rows[0]) for row in rows}


def test_rows_know_which_improvements_their_labels_add():
    assert changes("one-on", "maml") == {
        "maml": ((), ()),
        **{f"maml + {name}": ((name,), ()) for name in IMPROVEMENTS},
        "maml + bnrs + bnwb": (("bnrs", "bnwb"), ()),
        "maml++": ((), ()),  # its name lists no improvements
    }


@pytest.mark.parametrize(("algo", "base"), [("maml++", "maml++"), ("boil", "boil with all")])
def test_rows_know_which_improvements_their_labels_remove(algo, base):
    taken = changes("one-off", algo)
    assert taken[base] == ((), ())
    assert taken[f"{base} - msl"] == ((), ("msl",))
    assert taken[f"{base} - bnrs - bnwb"] == ((), ("bnrs", "bnwb"))


def test_a_label_that_does_not_list_the_improvements_is_kept():
    baseline = RowSpec("maml", TrainConfig(algo="maml"), ())
    assert _changes(RowSpec("mine", TrainConfig(algo="maml", msl=True), ()), baseline) == ((), ())


def equal_runs(label, config):
    scores = {"best": np.array([0.4, 0.6])}
    evaluation = StoredEvaluation({"bn": "transductive"}, scores, {}, 0, 0, (), Path())
    return _RowRuns(RowSpec(label, config, ()), (), {0: evaluation})


def test_an_improvement_that_the_test_does_not_use_is_reported(monkeypatch):
    config = TrainConfig(algo="maml", lslr=True)
    others = [replace(config, bnrs=True), replace(config, ca=True)]
    runs = [equal_runs(label, each) for label, each in zip("abc", (config, *others), strict=True)]
    equal = "equal on every task: a, b, c"
    note = "{} keeps statistics that only --bn {} uses, so alone it has no effect here"
    assert _equal_rows(runs) == [equal, note.format("bnrs", "running")]
    monkeypatch.setitem(IMPROVEMENTS, "bnrs", replace(IMPROVEMENTS["bnrs"], read_by_bn=None))
    monkeypatch.setitem(IMPROVEMENTS, "ca", replace(IMPROVEMENTS["ca"], read_by_bn="support"))
    assert _equal_rows(runs) == [equal, note.format("ca", "support")]


def test_a_command_line_that_is_not_utf8_is_kept(tmp_path):
    (tmp_path / "command.txt").write_bytes(b"mamlctl train --out r\xff\n")
    reference = RunReference.of_run(RunFolder(tmp_path, TrainConfig()))
    assert reference.command == "mamlctl train --out r\udcff"
