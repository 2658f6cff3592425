"""Every output format of a table contains the same numbers, as a reader of that format finds them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from io import StringIO

import pytest
from helpers.table_cases import HOSTILE, TABLES, curves, empty, full, hostile, one_on, text_rows
from rich.cells import cell_len
from rich.console import Console

from mamlctl.core.errors import SettingsError
from mamlctl.core.formatting import csv_cell
from mamlctl.display.comparison_table import show_table
from mamlctl.report.column_texts import letter
from mamlctl.report.columns import COLUMNS
from mamlctl.report.export import document, to_csv, to_latex, to_markdown


def shown(table, width=None, sort=None):
    """The output on a terminal of that width, or in a pipe."""
    out = StringIO()
    given = {"force_terminal": True, "color_system": None} if width else {}
    show_table(Console(file=out, width=width, **given), table, sort)
    return out.getvalue()


def markdown_cells(text):
    """The cells of a Markdown table."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    parts = [re.split(r"(?<!\\) \| ", row.removeprefix("| ").removesuffix(" |")) for row in rows]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in parts if not row[0].startswith(":-")]


@pytest.mark.parametrize("name", TABLES)
def test_json_contains_every_number_and_no_curves(name):
    table = TABLES[name]()
    text = json.dumps(document(table), allow_nan=False)
    assert text == json.dumps(document(TABLES[name]()), allow_nan=False)
    read = json.loads(text)
    assert read["format"] == 1
    assert "validation" not in text and "losses" not in text
    assert [row["label"] for row in read["rows"]] == [row.label for row in table.rows]
    for row, given in zip(read["rows"], table.rows, strict=True):
        assert [cell["run"] for cell in row["cells"]] == [cell.run for cell in given.cells]
        assert row["published"] == [asdict(entry) for entry in given.published]
        if given.best is None:
            assert row["best"] is None
            continue
        assert row["best"]["mean"] == given.best.mean
        assert tuple(row["best"]["per_seed"]) == given.best.per_seed
        if given.best.difference is not None:
            for key, value in asdict(given.best.difference).items():
                assert row["best"]["difference"][key] == (value if math.isfinite(value) else None)


@pytest.mark.parametrize("name", TABLES)
def test_csv_is_read_back_as_the_same_numbers(name):
    table = TABLES[name]()
    rows = list(csv.DictReader(StringIO(to_csv(table), newline="")))
    assert [row["label"] for row in rows] == [csv_cell(row.label) for row in table.rows]
    for read, row in zip(rows, table.rows, strict=True):
        for model, score in (("best", row.best), ("ensemble", row.ensemble)):
            known = {"mean": score.mean, "ci95": score.ci95} if score else {"mean": None, "ci95": None}
            difference = score and score.difference
            known |= {f"difference_{key}": getattr(difference, key, None) for key in ("mean", "low", "p")}
            for key, value in known.items():
                field = read[f"{model}_{key}"]
                assert field == "" if value is None or not math.isfinite(value) else float(field) == value
        assert int(read["runs_diverged"]) == row.divergences
        assert read["published_source"] == (row.published[0].source if row.published else "")


@pytest.mark.parametrize("name", TABLES)
def test_markdown_and_the_pipe_contain_the_cells(name):
    table = TABLES[name]()
    expected = text_rows(table)
    assert markdown_cells(to_markdown(table)) == expected
    piped = [re.split(r"  +", line.strip()) for line in shown(table).splitlines()]
    for row in expected:
        assert [cell for cell in row if cell] in piped


@pytest.mark.parametrize("name", TABLES)
def test_texts_are_the_rounded_numbers(name):
    table = TABLES[name]()
    scale, digits = (100, 2) if table.metric == "accuracy" else (1, 3)
    heads, *rows = text_rows(table)
    for texts, row in zip(rows, table.rows, strict=True):
        line = dict(zip(heads, texts, strict=True))
        best = next(line[head] for head in heads if head.startswith("best"))
        if row.best is None:
            assert "diverged" in best or "missing" in best
            continue
        assert float(best.split(" ± ")[0]) == pytest.approx(scale * row.best.mean, abs=0.6 * 10**-digits)
        difference = row.best.difference
        if difference is not None and math.isfinite(difference.low):
            shown_numbers = [float(number) for number in re.findall(r"[+-][\d.]+", line["difference"])]
            given = [difference.mean, difference.low, difference.high]
            assert shown_numbers == pytest.approx([scale * value for value in given], abs=0.6 * 10**-digits)
            assert line["difference"].endswith("*") == (row.best.p_holm < 0.05)


def test_a_row_without_a_score_names_the_reason_and_every_unfinished_run_is_reported():
    text = shown(one_on())
    assert re.search(r"^maml \+ bnwb +0 of 3 +diverged at meta-step 121 +3$", text, flags=re.MULTILINE)
    assert "maml + bnwb, seeds 0, 1, 2: diverged at meta-step 121: the query loss is nan" in text
    assert "maml + ca, seed 0: failed after 75 meta-steps: out of memory" in text
    assert "1 of 27 runs is missing" in text
    assert shown(empty()).count("3 missing") == 9


def test_numbers_quoted_from_memory_are_marked_and_sources_are_named():
    heads, *rows = text_rows(one_on())
    published = {row[0]: row[heads.index("published %")] for row in rows}
    assert published["maml + lslr"] == "95.77 ± 0.38 a†"
    assert published["maml++"] == "97.65 ± 0.05 a"
    assert published["maml + bnrs"] == ""
    note = "a: MAML++ (Antoniou et al. 2019); maml++: ensemble of the 5 best checkpoints, 3 seeds."
    for text in (shown(one_on()), to_markdown(one_on())):
        assert note in text
        assert "†: quoted from memory, not verified" in text


def test_each_source_has_its_own_letter():
    assert [letter(place) for place in (0, 1, 25, 26)] == ["a", "b", "z", "a1"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 140, 200])
@pytest.mark.parametrize("name", TABLES)
def test_no_line_is_wider_than_the_terminal(name, width):
    table = TABLES[name]()
    text = shown(table, width)
    if max(cell_len(row.label) for row in table.rows) <= width and name != "hostile":
        assert max(map(cell_len, text.splitlines())) <= width
    for row in table.rows[:9]:
        assert " ".join(row.label.split()).replace("\x1b", "?") in text
    heads = [cell for cell in text_rows(table)[0][1:] if cell not in re.sub(r"no room for:[^(]*", "", text)]
    for head in heads:  # dropped columns are named
        assert head in " ".join(text.split())


def test_a_label_that_a_spreadsheet_would_run_gets_an_apostrophe():
    table = one_on()
    first = replace(table.rows[0], label='=HYPERLINK("x")')
    read = list(csv.DictReader(StringIO(to_csv(replace(table, rows=(first, *table.rows[1:]))))))
    assert read[0]["label"] == '\'=HYPERLINK("x")'
    assert [row["label"] for row in read[1:]] == [row.label for row in table.rows[1:]]


@pytest.mark.parametrize(("sort", "ascending"), [("best", False), ("difference", False), ("seconds", True)])
def test_sorting_puts_rows_without_a_value_last(sort, ascending):
    table = one_on()
    labels = [row[0] for row in text_rows(table, sort)[1:]]
    assert labels[-1] == "maml + bnwb"
    value = next(column.value for column in COLUMNS if column.key == sort)
    values = [value(next(row for row in table.rows if row.label == label)) for label in labels]
    if sort == "difference":
        values[labels.index(table.baseline)] = 0.0
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=not ascending)
    assert [row["label"] for row in document(table, sort)["rows"]] == labels
    assert [row["label"] for row in csv.DictReader(StringIO(to_csv(table, sort)))] == labels


def test_the_lowest_mse_is_the_best():
    table = curves()
    assert [row[0] for row in text_rows(table, "best")[1:]] == ["maml", "transfer"]
    assert text_rows(table)[2][2] == f"{table.rows[1].best.mean:.3f} ± {table.rows[1].best.ci95:.3f}"
    assert "%" not in "".join(text_rows(table)[0]).replace("99 %", "")
    assert "lower is better" in shown(table)
    assert "because there is one seed" in shown(table)


def test_an_unknown_column_is_refused_with_a_suggestion():
    with pytest.raises(SettingsError, match="cannot sort by 'diference'") as refused:
        text_rows(one_on(), "diference")
    assert refused.value.hint == "did you mean 'difference'?"
    with pytest.raises(SettingsError) as refused:
        text_rows(one_on(), "qqq")
    assert "published" in refused.value.hint


def test_batch_norm_modes_and_inner_steps_are_columns_only_if_rows_differ():
    table = one_on()
    assert "bn" not in text_rows(table)[0]
    rows = (replace(table.rows[0], bn="running", inner_steps=3, ensemble_size=4), *table.rows[1:])
    heads, first, second, *_ = text_rows(replace(table, rows=rows))
    assert dict(zip(heads, first, strict=True))["bn"] == "running"
    assert dict(zip(heads, second, strict=True))["inner steps"] == "5"
    assert first[heads.index("ensemble %")].endswith(" (4)")


PAPER = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
%s
\end{document}
"""


@pytest.mark.render
@pytest.mark.parametrize("name", TABLES)
def test_latex_compiles_and_shows_the_cells(name, tmp_path):
    compiler = shutil.which("pdflatex") or shutil.which("tectonic")
    if compiler is None:
        pytest.skip("neither pdflatex nor tectonic is installed")
    table = TABLES[name]()
    (tmp_path / "paper.tex").write_text(PAPER % to_latex(table))
    mode = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in compiler else []
    done = subprocess.run(
        [compiler, *mode, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    for problem in ("Overfull", "too large", "Missing character"):
        assert problem not in done.stdout + (tmp_path / "paper.log").read_text(errors="replace"), problem
    if shutil.which("pdftotext") and name == "one-on":
        subprocess.run(["pdftotext", "-layout", "paper.pdf"], cwd=tmp_path, check=True)
        text = " ".join((tmp_path / "paper.txt").read_text().split())
        for line in text_rows(table)[1:]:
            assert line[0] in text
            assert line[2] in text


def test_latex_escapes_and_spans():
    text = to_latex(hostile())
    assert r"\textless{}b\textgreater{}\&\_\%\$\#\textasciitilde{}\textasciicircum{}\{\}" in text
    assert HOSTILE not in text
    rows = [line for line in to_latex(one_on()).splitlines() if line.endswith(r"\\")]
    columns = len(text_rows(one_on())[0])
    assert r"\multicolumn{5}{l}{diverged at meta-step 121}" in to_latex(one_on())
    for row in rows:
        spanned = sum(int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", row))
        assert row.count(" & ") + 1 + spanned == columns


def test_an_ascii_pipe_gets_question_marks():
    class Ascii(StringIO):
        encoding = "ascii"

    out = Ascii()
    show_table(Console(file=out, width=80), one_on())
    assert out.getvalue().isascii()
    assert "90.49 ? 0.62" in out.getvalue() or "? 0." in out.getvalue()


def test_each_of_64_rows_is_one_line():
    lines = shown(full(), 120).splitlines()
    assert sum(line.startswith("maml") for line in lines) == 64
