"""A table of runs as one page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.files import write_text
from mamlctl.core.statistics import Difference
from mamlctl.report.columns import (
    RECALLED,
    SCORES,
    RenderedRow,
    RenderedTable,
    grid,
    head_parts,
    legend,
    signed,
)
from mamlctl.report.figures.style import save
from mamlctl.report.figures.svg import inline
from mamlctl.report.figures.table_figures import pictures
from mamlctl.report.table import Cell, Published, Row, Table

STYLE = Path(__file__).parent / "templates" / "report.css"

WHY = {  # beneath each kind of picture, by the beginning of its name
    "training": "Line: mean of the finished seeds; band: from their least to their greatest score. "
    "Every panel has the baseline in grey.",
    "differences": "To the right of zero a row is above the baseline. Thick: interval for these very models "
    "on new tasks; thin: for newly trained models as well, of which one seed says nothing. "
    "An arrow: it goes on beyond the picture.",
    "adaptation": "Of the single best checkpoints, mean over seeds; the baseline in grey.",
    "rates": "Learnt inner learning rates (LSLR) at the end of training; one colour scale for all.",
}


def write_report(table: Table, folder: Path, sort: str | None = None) -> Path:
    """Write folder/report.html, and its pictures as PNG and SVG under folder/plots; tell the page's path.

    The same table gives the same bytes. Raises SettingsError for a column that cannot be sorted by.
    """
    shown = grid(table, sort)
    drawn = []
    for number, picture in enumerate(pictures(table)):
        _, svg = save(picture.figure, folder / "plots" / picture.name)
        element = inline(svg.read_bytes(), f"f{number}-", picture.title)
        drawn.append(_figure(element, WHY[picture.name.partition("-")[0]], f"plots/{picture.name}"))
    page = folder / "report.html"
    write_text(page, _page(table, shown, drawn))
    return page


def _page(table: Table, shown: RenderedTable, drawn: Sequence[str]) -> str:
    title = _text(table.title)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="head">{" · ".join(map(_text, head_parts(table)))}</p>',
        _list("notes", [*shown.remarks, *table.notes]),
        _table(shown, table.baseline),
        _list("legend", [*legend(table, shown.heads), *(f"{name}: {told}." for name, told in shown.sources)]),
        *(["<h2>Pictures</h2>", *drawn] if drawn else []),
        *_differences(table),
        *_published(table),
        "<h2>Settings</h2>",
        _mapping("all rows", table.settings),
        _scrolled(_pairs(["row", "what sets it apart"], _apart(table.rows), "plain")),
        "<h2>Machine</h2>",
        _mapping("of the first run", table.environment),
        "<h2>Commands</h2>",
        *(f"<pre>{_text(command)}</pre>" for command in table.commands),
        *map(_runs, table.rows),
    ]
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(text: object) -> str:
    return escape(formatting.strip_controls(str(text)))


def _list(kind: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if lines else ""


def _scrolled(element: str) -> str:
    """A box of its own that scrolls sideways, so that the page does not; the keyboard reaches it."""
    return f'<div class="box" tabindex="0">{element}</div>'


def _figure(svg: str, why: str, stem: str) -> str:
    files = f"{stem}.png, {stem}.svg"
    caption = f"<figcaption>{_text(why)} <small>{_text(files)}</small></figcaption>"
    return f"<figure>{_scrolled(svg)}{caption}</figure>"


def _table(shown: RenderedTable, baseline: str) -> str:
    heads = "".join(f'<th scope="col">{_text(head)}</th>' for head in shown.heads.values())
    body = "\n".join(_line(line, list(shown.heads), baseline) for line in shown.lines)
    return _scrolled(
        f'<table class="scores">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    )


def _line(line: RenderedRow, keys: Sequence[str], baseline: str) -> str:
    wide = [key for key in keys if key in SCORES]
    numbers = _numbers(line.row)
    cells = []
    for key in keys:
        text = _text(line.cells[key])
        if key == "row":
            cells.append(f'<th scope="row">{text}</th>')
        elif line.told and key == "best":
            cells.append(f'<td class="told" colspan="{len(wide)}">{text}</td>')
        elif not (line.told and key in wide):
            value = numbers.get(key)
            number = f'<data value="{value!r}">{text}</data>' if text and value is not None else text
            cells.append(f'<td class="{key}">{number}</td>')
    kind = ' class="baseline"' if line.row.label == baseline else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _numbers(row: Row) -> Mapping[str, float | None]:
    """The figure behind each cell, in full."""
    best, ensemble = row.best, row.ensemble
    return {
        "best": best.mean if best else None,
        "sd": best.deviation if best else None,
        "ensemble": ensemble.mean if ensemble else None,
        "difference": best.difference.mean if best and best.difference else None,
        "p": best.p_holm if best else None,
        "published": row.published[0].score if row.published else None,
        "steps": row.steps_to_99,
        "seconds": row.step_s,
        "diverged": row.divergences,
    }


def _differences(table: Table) -> list[str]:
    """Every difference with all that is told of it: for new seeds and tasks, and for these very models."""
    rows = [
        _difference(table, f"{row.label} ({name})", score.difference, score.p_holm)
        for row in table.rows
        for name, score in (("best", row.best), ("ensemble", row.ensemble))
        if score is not None and score.difference is not None
    ]
    if not rows:
        return []
    heads = ["row", "difference", "seeds", "new seeds and tasks", "p", "p (Holm)"]
    heads += ["these models, new tasks", "p", "p, signs flipped", "bootstrap"]
    return ["<h2>Differences in full</h2>", _scrolled(_pairs(heads, rows, "plain figures"))]


def _difference(table: Table, name: str, found: Difference, p_holm: float | None) -> list[str]:
    def told(low: float, high: float) -> str:
        return f"[{signed(table.metric, low)},\u00a0{signed(table.metric, high)}]"

    def share(p: float) -> str:
        return "<0.0001" if p < 0.0001 else f"{p:.4f}"

    return [
        name,
        signed(table.metric, found.mean),
        str(found.seeds),
        told(found.low, found.high),
        share(found.p),
        "" if p_holm is None else share(p_holm),
        told(found.tasks_low, found.tasks_high),
        share(found.tasks_p),
        share(found.permutation_p),
        told(found.bootstrap_low, found.bootstrap_high),
    ]


def _pairs(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of words; the first of each row is its head."""
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "\n".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<table class="{kind}">\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _mapping(name: str, values: Mapping[str, Any]) -> str:
    rows = [[key, _value(value)] for key, value in values.items()]
    return _scrolled(_pairs(["setting", name], rows, "plain")) if rows else ""


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _apart(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [row.label, ", ".join(f"{key} {_value(value)}" for key, value in row.settings.items()) or "nothing"]
        for row in rows
    ]


def _published(table: Table) -> Iterator[str]:
    rows = [
        [row.label, _printed(entry), entry.source, entry.row, _provenance(entry)]
        for row in table.rows
        for entry in row.published
    ]
    if rows:
        heads = ["our row", "published", "source", "its row", "how the number came here"]
        yield "<h2>Published numbers</h2>"
        yield _scrolled(_pairs(heads, rows, "plain"))


def _printed(entry: Published) -> str:
    mark = "" if entry.verified else f" {RECALLED}"
    return formatting.score(entry.metric, entry.score, entry.half_width) + mark


def _provenance(entry: Published) -> str:
    told = "read in a transcription" if entry.verified else f"{RECALLED} recalled, not verified"
    return f"{told}; {entry.note}" if entry.note else told


def _runs(row: Row) -> str:
    heads = ["seed", "run", "status", "meta-steps", "per step", "to 99 %", "on"]
    table = _scrolled(_pairs(heads, [_run(cell) for cell in row.cells], "plain"))
    commands = "".join(f"<pre>{_text(cell.command)}</pre>" for cell in row.cells)
    count = f"{len(row.cells)} {formatting.plural(len(row.cells), 'run')}"
    return f"<details><summary>{_text(row.label)}: {count}</summary>\n{table}\n{commands}</details>"


def _run(cell: Cell) -> list[str]:
    return [
        str(cell.seed),
        cell.run,
        f"{cell.status}: {cell.reason}" if cell.reason else cell.status,
        f"{cell.steps:,}",
        "" if cell.step_s is None else formatting.duration(cell.step_s),
        "" if cell.steps_to_99 is None else f"{cell.steps_to_99:,}",
        cell.device,
    ]
