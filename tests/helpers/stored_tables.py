"""The tables of the documentation, read from the JSON documents that `ablate --json` wrote."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields

from helpers.shared import ROOT
from mamlctl.core.statistics import Difference
from mamlctl.report.table import Cell, Published, Row, Score, Table

TABLES = ROOT / ".github" / "tables"


def stored_table(name):
    """A table of .github/tables, without validation curves, which the documents do not contain."""
    stored = json.loads((TABLES / f"{name}.json").read_text())
    rows = tuple(_row(row, stored["baseline"]) for row in stored["rows"])
    return Table(**_known(Table, stored) | {"rows": rows})


def _known(record, stored):
    names = {item.name for item in fields(record)}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items() if key in names}


def _row(stored, baseline):
    scores = {model: _score(stored[model]) for model in ("best", "ensemble")}
    cells = tuple(Cell(**_known(Cell, cell) | {"validation": ()}) for cell in stored["cells"])
    published = tuple(Published(**entry) for entry in stored["published"])
    change = stored["label"].removeprefix(baseline).split(" ")
    changed = {sign: tuple(name for at, name in itertools.pairwise(change) if at == sign) for sign in "+-"}
    known = _known(Row, stored) | scores | {"cells": cells, "published": published}
    return Row(**known, added=changed["+"], removed=changed["-"])


def _score(stored):
    found = stored["difference"]
    if found is not None:
        # These documents are older than `is_equal`.
        is_equal = {found[key] for key in ("mean", "low", "high", "tasks_low", "tasks_high")} == {0.0}
        found = Difference(**{"is_equal": is_equal} | found)
    return Score(**_known(Score, stored) | {"difference": found, "per_step_tasks": 300})
