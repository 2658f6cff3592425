"""A column is one entry of COLUMNS: every output format has it, and no other list names it."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import subprocess
import sys
from io import StringIO

import pytest
from helpers.pages import apply_diff, documented_diff
from helpers.table_cases import one_on, text_rows
from rich.console import Console

from mamlctl.core.errors import SettingsError
from mamlctl.display.comparison_table import show_table
from mamlctl.report import columns, html_page
from mamlctl.report.columns import COLUMNS
from mamlctl.report.export import document, to_csv, to_latex, to_markdown


def _runs_done(row):
    return sum(cell.status == "finished" for cell in row.cells)


@pytest.fixture
def runs_done(tmp_path, monkeypatch):
    """The entry that contributing.md adds, from a copy of the module with that diff."""
    path = tmp_path / "mamlctl" / "report" / "columns.py"
    path.parent.mkdir(parents=True)
    shutil.copy(columns.__file__, path)
    apply_diff(documented_diff("Add a table column"), tmp_path)
    spec = importlib.util.spec_from_file_location("documented_columns", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert len(module.COLUMNS) == len(COLUMNS) + 1
    return module.COLUMNS[-1]


def test_a_new_entry_is_a_column_in_every_format(monkeypatch, tmp_path, runs_done):
    with pytest.raises(SettingsError):
        text_rows(one_on(), "runs_done")
    monkeypatch.setattr(columns, "COLUMNS", (*COLUMNS, runs_done))
    table = one_on()
    counts = {row.label: _runs_done(row) for row in table.rows}
    assert sorted(set(counts.values())) == [0, 2, 3]
    heads, *rows = text_rows(table, "runs_done")
    assert heads[-1] == "runs done"
    assert [counts[row[0]] for row in rows] == sorted(counts.values(), reverse=True)
    assert {row[0]: row[-1] for row in rows} == {
        label: f"{count} done" if count else "" for label, count in counts.items()
    }
    assert [row["runs_done"] for row in document(table)["rows"]] == list(counts.values())
    read = csv.DictReader(StringIO(to_csv(table)))
    assert [int(row["runs_done"]) for row in read] == list(counts.values())
    out = StringIO()
    show_table(Console(file=out), table)
    monkeypatch.setattr(html_page, "pictures", lambda table: ())
    page = html_page.write_report(table, tmp_path).read_text()
    for text in (out.getvalue(), to_markdown(table).replace("\\", ""), to_latex(table), page):
        assert "runs done" in text
        assert text.count("3 done") == list(counts.values()).count(3)
        assert runs_done.legend in text
    assert '<td class="runs_done"><data value="2">2 done</data></td>' in page


def test_narrow_terminals_drop_a_new_column_first(monkeypatch, runs_done):
    monkeypatch.setattr(columns, "COLUMNS", (*COLUMNS, runs_done))
    out = StringIO()
    show_table(Console(file=out, width=120, force_terminal=True, color_system=None), one_on())
    assert "3 done" not in out.getvalue()
    assert "runs done" in out.getvalue().partition("no room for: ")[2]


def test_keys_are_unique_and_only_some_columns_are_never_dropped():
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
    assert [column.key for column in COLUMNS if column.drop_rank is None] == ["row", "best", "difference"]
    scores = [place for place, column in enumerate(COLUMNS) if column.is_score]
    assert scores == list(range(scores[0], scores[-1] + 1))  # adjacent


@pytest.mark.parametrize(
    ("module", "absent"),
    [("mamlctl.report.columns", ("torch", "numpy", "jinja2")), ("mamlctl.cli.compare", ("torch", "jinja2"))],
)
def test_sorting_is_checked_without_slow_imports(module, absent):
    code = f"import sys, {module}; sys.exit(', '.join(set({absent}) & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)
