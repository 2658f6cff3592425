"""A table of runs for other programs and for papers: one document, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from io import StringIO
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.files import finite
from mamlctl.core.statistics import Difference
from mamlctl.report.columns import SCORES, RenderedRow, RenderedTable, grid, head_parts, legend, ordered
from mamlctl.report.table import MODELS, Cell, Row, Score, Table

FORMAT = 1

CURVES = ("validation",)  # a run's folder has them; a table's document would be mostly those

DIFFERENCE = tuple(item.name for item in fields(Difference))

# What TeX takes for orders, and signs that a font of 1982 lacks.
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
    "\u2060": "{}",  # a word joiner
}

LATIN = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("ÐÞðþ")  # letters with accents

MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|&$~#])")


def document(table: Table, sort: str | None = None) -> dict[str, Any]:
    """Everything but the curves, for `--json`; the same table gives the same bytes, and no number is NaN."""
    shared = {
        item.name: getattr(table, item.name)
        for item in fields(table)
        if item.name not in ("rows", "notes", "settings", "environment", "commands")
    }
    rows = [_row(row) for row in ordered(table, sort)]
    rest = {
        "settings": table.settings,
        "environment": table.environment,
        "commands": table.commands,
        "notes": table.notes,
    }
    known: dict[str, Any] = _plain(finite({"format": FORMAT, **shared, "rows": rows, **rest}))
    return known


def _row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "settings": row.settings,
        "bn": row.bn,
        "inner_steps": row.inner_steps,
        "best": None if row.best is None else asdict(row.best),
        "ensemble": None if row.ensemble is None else asdict(row.ensemble),
        "ensemble_size": row.ensemble_size,
        "published": [asdict(entry) for entry in row.published],
        "steps_to_99": row.steps_to_99,
        "step_s": row.step_s,
        "diverged": row.divergences,
        "cells": [_cell(cell) for cell in row.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {item.name: getattr(cell, item.name) for item in fields(cell) if item.name not in CURVES}


def _plain(value: Any) -> Any:
    """What JSON knows; paths and the like as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def to_csv(table: Table, sort: str | None = None) -> str:
    """A line a row, a column a figure: numbers in full, accuracies 0..1, nothing where there is none."""
    lines = [_figures(table, row) for row in ordered(table, sort)]
    out = StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _figures(table: Table, row: Row) -> dict[str, Any]:
    known: dict[str, Any] = {"label": row.label, "metric": table.metric, "runs": len(row.cells)}
    known |= {f"runs_{status}": _count(row, status) for status in ("finished", "diverged")}
    known |= {"bn": row.bn, "inner_steps": row.inner_steps, "tasks": table.tasks}
    for model, score in zip(MODELS, (row.best, row.ensemble), strict=True):
        known |= {f"{model}_{key}": value for key, value in _of_score(score).items()}
    known["ensemble_size"] = row.ensemble_size
    entry = row.published[0] if row.published else None
    for key in ("score", "half_width", "source", "row", "verified"):
        known[f"published_{key}"] = getattr(entry, key, None)
    return dict(finite(known | {"steps_to_99": row.steps_to_99, "step_s": row.step_s}))


def _count(row: Row, status: str) -> int:
    return sum(cell.status == status for cell in row.cells)


def _of_score(score: Score | None) -> dict[str, Any]:
    difference = score.difference if score else None
    return {
        "seeds": len(score.per_seed) if score else 0,
        **{key: getattr(score, key, None) for key in ("mean", "ci95", "deviation")},
        **{f"difference_{key}": getattr(difference, key, None) for key in DIFFERENCE},
        "difference_p_holm": score.p_holm if score else None,
    }


def to_markdown(table: Table, sort: str | None = None) -> str:
    """A table as GitHub reads it, between a head line and what the numbers mean."""
    shown = grid(table, sort)
    heads, *rows = ([_markdown(text) for text in line] for line in shown.texts())
    rule = [":--" if key == "row" else "--:" for key in shown.heads]
    lines = [f"**{_markdown(table.title)}**", "", _markdown(", ".join(head_parts(table))), ""]
    lines += ["| " + " | ".join(line) + " |" for line in (heads, rule, *rows)]
    below = [_markdown(line) for line in last_lines(table, shown)]
    return "\n".join([*lines, "", *(f"- {line}" for line in below)]) + "\n"


def _markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def last_lines(table: Table, shown: RenderedTable) -> list[str]:
    """What a reader needs below the table: meanings, sources, unfinished runs, notes."""
    sources = [f"{name}: {source}." for name, source in shown.sources]
    return [
        *legend(table, shown.heads),
        *sources,
        *shown.remarks,
        *map(formatting.strip_controls, table.notes),
    ]


def to_latex(table: Table, sort: str | None = None) -> str:
    r"""A whole table environment for \usepackage{booktabs,graphicx}, shrunk where it is wider than a line."""
    shown = grid(table, sort)
    meaning, *rest = last_lines(table, shown)
    caption = _tex_prose([table.title, ", ".join(head_parts(table)), meaning])
    heads = " & ".join(tex(head) for head in shown.heads.values())
    rows = [_tex_line(line, list(shown.heads)) for line in shown.lines]
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        r"\smallskip\footnotesize\setlength{\tabcolsep}{3pt}%",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}l{'r' * (len(shown.heads) - 1)}@{{}}}}",
        r"\toprule",
        rf"{heads} \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\par\smallskip\raggedright {_tex_prose(rest)}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex_prose(sentences: Sequence[str]) -> str:
    return " ".join(tex(text if text.endswith(".") else f"{text}.") for text in sentences)


def _tex_line(line: RenderedRow, keys: list[str]) -> str:
    """A row's cells; why it has no score goes over all columns of scores."""
    wide = [key for key in keys if key in SCORES]
    cells = {key: tex(line.cells[key]) for key in keys if not (line.told and key in wide[1:])}
    if line.told:
        cells["best"] = rf"\multicolumn{{{len(wide)}}}{{l}}{{{cells['best']}}}"
    return " & ".join(cells.values())


def tex(text: str) -> str:
    """Text for pdflatex without further packages; a question mark for what its first fonts cannot write."""
    spaced = re.sub(r"(?<!\w)-(?=\d)", "−", " ".join(formatting.strip_controls(text).split()))
    spaced = re.sub(r"-(?=-)", "-\u2060", spaced)  # two in a row would become a dash
    return "".join(TEX.get(sign) or (sign if sign in LATIN or sign.isascii() else "?") for sign in spaced)
