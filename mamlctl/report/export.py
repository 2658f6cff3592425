"""A table of runs for other programs and for papers: JSON, CSV, Markdown and LaTeX.

Each format has a function of the table and of the column to sort by; None keeps the plan's order. It raises
SettingsError if rows cannot be sorted by that column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from io import StringIO
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.files import finite
from mamlctl.report import columns
from mamlctl.report.rendered_table import (
    RenderedRow,
    RenderedTable,
    head_parts,
    meanings,
    render_table,
    warnings,
)
from mamlctl.report.table import Cell, Table
from mamlctl.report.verdict import verdict

FORMAT = 1

# Characters that have a meaning in TeX, and characters that its default fonts lack.
TEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "×": r"$\times$",
    "−": "$-$",
    "\u2060": "{}",  # word joiner: keeps two hyphens apart
}
LATIN = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("ÐÞðþ")  # accented letters in the default fonts
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|&$~#])")


def document(table: Table, sort: str | None = None) -> dict[str, Any]:
    """The table without its validation curves, for `--json`.

    The same table gives the same bytes, and numbers that are not finite become None.
    """
    last = ("settings", "environment", "commands", "notes")
    names = [item.name for item in fields(table) if item.name not in ("rows", *last)]
    ordered = columns.sorted_table(table, sort)
    rows = []
    for row in ordered.rows:
        texts = [column.fields_in("json", ordered, row) for column in columns.COLUMNS]
        rows.append({**_merged(texts), "cells": [_cell_document(cell) for cell in row.cells]})
    whole = {"format": FORMAT, **_named(table, names), "rows": rows, **_named(table, last)}
    json: dict[str, Any] = _plain(finite(whole))
    return json


def _named(record: Table | Cell, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _cell_document(cell: Cell) -> dict[str, Any]:
    """A run without its validation curve, which would take most of the document; its folder has it."""
    return _named(cell, [item.name for item in fields(cell) if item.name != "validation"])


def _plain(value: Any) -> Any:
    """Convert a value to JSON types; paths and other types become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def to_csv(table: Table, sort: str | None = None) -> str:
    """One line per row and one column per value: unrounded, accuracies 0..1, missing values empty."""
    ordered = columns.sorted_table(table, sort)
    lines = [
        finite(_merged([column.fields_in("csv", ordered, row) for column in columns.COLUMNS]))
        for row in ordered.rows
    ]
    out = StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: formatting.csv_cell(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def to_markdown(table: Table, sort: str | None = None) -> str:
    """A table in GitHub's Markdown, between its verdict and its legends."""
    shown = render_table(table, sort)
    heads, *rows = ([_markdown(text) for text in line] for line in shown.lines())
    rule = [":--", *("--:" for _ in shown.columns[1:])]
    lines = [f"**{_markdown(table.title)}**", "", _markdown(", ".join(head_parts(table))), ""]
    lines += [_markdown(" ".join(verdict(table))), ""]
    lines += ["| " + " | ".join(line) + " |" for line in (heads, rule, *rows)]
    below = [_markdown(line) for line in (*meanings(table, shown), *warnings(table, shown))]
    return "\n".join([*lines, "", *(f"- {line}" for line in below)]) + "\n"


def _markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def to_latex(table: Table, sort: str | None = None) -> str:
    r"""A complete table environment for \usepackage{booktabs,graphicx}, scaled down to the line width."""
    shown = render_table(table, sort)
    meaning, *below = [*meanings(table, shown), *warnings(table, shown)]
    caption = _tex_prose([table.title, ", ".join(head_parts(table)), meaning])
    heads = " & ".join(tex(head) for head in shown.heads.values())
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        r"\smallskip\footnotesize\setlength{\tabcolsep}{3pt}%",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}l{'r' * (len(shown.columns) - 1)}@{{}}}}",
        r"\toprule",
        rf"{heads} \\",
        r"\midrule",
        *(rf"{_tex_row(shown, row)} \\" for row in shown.rows),
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\par\smallskip\raggedright {_tex_prose(below)}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex_prose(sentences: Sequence[str]) -> str:
    return " ".join(tex(text if text.endswith(".") else f"{text}.") for text in sentences)


def _tex_row(shown: RenderedTable, row: RenderedRow) -> str:
    return " & ".join(
        rf"\multicolumn{{{span}}}{{l}}{{{tex(text)}}}" if span else tex(text)
        for _, text, span in shown.across(row)
    )


def tex(text: str) -> str:
    """Text for pdflatex without further packages; characters that its default fonts lack become '?'."""
    spaced = formatting.minus_signs(" ".join(formatting.strip_controls(text).split()))
    spaced = re.sub(r"-(?=-)", "-\u2060", spaced)  # two in a row would become a dash
    return "".join(TEX.get(sign) or (sign if sign in LATIN or sign.isascii() else "?") for sign in spaced)
