"""A table of runs as a self-contained HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from mamlctl.core import formatting
from mamlctl.core.files import write_text
from mamlctl.core.literals import Metric
from mamlctl.core.statistics import Difference
from mamlctl.report.column_texts import FROM_MEMORY, RECALLED
from mamlctl.report.figures.style import save
from mamlctl.report.figures.svg import inline
from mamlctl.report.figures.table_figures import pictures
from mamlctl.report.rendered_table import head_parts, meanings, render_table, warnings
from mamlctl.report.table import Cell, Published, Table
from mamlctl.report.verdict import verdict
from mamlctl.settings.schema import FIELDS

TEMPLATES = Path(__file__).parent / "templates"
SHORT = 16  # characters of a name that fits the first column of any table


def write_report(table: Table, folder: Path, sort: str | None = None, *, files: Sequence[str] = ()) -> Path:
    """Write folder/report.html, and its figures as PNG and SVG in folder/plots.

    The same table gives the same bytes.

    Args:
        table: the table; a table without scores gives a page without figures.
        folder: created if it does not exist.
        sort: key of the column to sort by; None keeps the plan's order.
        files: other files of the folder that the page has links to.

    Returns:
        The path of the page.

    Raises:
        SettingsError: rows cannot be sorted by the column.
    """
    shown = render_table(table, sort)
    figures = []
    for number, picture in enumerate(pictures(table)):
        _, svg = save(picture.figure, folder / "plots" / picture.name)
        element = Markup(inline(svg.read_bytes(), f"f{number}-", picture.title))  # ElementTree has escaped it
        names = [f"plots/{picture.name}{ending}" for ending in (".png", ".svg")]
        figures.append((element, picture.title, picture.caption, [_link(name) for name in names]))
    changed, usual = _settings_by_default(table.settings)
    text = _template().render(
        table=table,
        shown=shown,
        head=head_parts(table),
        verdict=verdict(table),
        files=[_link(name) for name in files],
        warnings=warnings(table, shown),
        meanings=meanings(table, shown),
        figures=figures,
        differences=list(_differences(table)),
        published=list(_published_numbers(table)),
        changed_settings=changed,
        usual_settings=usual,
        row_settings=list(_row_settings(table)),
        machine=[[key, _property_text(value)] for key, value in table.environment.items()],
        runs=[(row, [_run_texts(cell) for cell in row.cells]) for row in table.rows],
        plural=formatting.plural,
        minus=formatting.minus_signs,
    )
    page = folder / "report.html"
    write_text(page, text)
    return page


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        finalize=_without_controls,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.j2")


def _breakable(text: object) -> Markup:
    """A name that may be broken after the signs in it, such as steps_per_epoch=500 on a narrow screen."""
    if isinstance(text, Markup):
        return text
    name = formatting.strip_controls(str(text))
    return Markup("<wbr>").join(re.split(r"(?<=[=_,])(?=\S)", name) if len(name) > SHORT else [name])


def _without_controls(value: object) -> object:
    """Strip control characters from everything that the template writes, except from our own markup."""
    return value if isinstance(value, Markup) else formatting.strip_controls(str(value))


def _differences(table: Table) -> Iterator[list[str]]:
    """Every difference with all its statistics: for new seeds and tasks, and for these trained models."""
    for row in table.rows:
        for name, score in (("best", row.best), ("ensemble", row.ensemble)):
            if score is not None and score.difference is not None:
                p_holm = "" if score.p_holm is None else _share(score.p_holm)
                texts = _difference_texts(table.metric, score.difference, p_holm)
                if score.difference.is_equal:
                    texts = [f"equal to {table.baseline}", texts[1], *("" for _ in texts[2:])]
                yield [f"{row.label} ({name})", *texts]


def _difference_texts(metric: Metric, difference: Difference, p_holm: str) -> list[str]:
    def interval(low: float, high: float) -> str:
        return f"[{formatting.signed(metric, low)},\u00a0{formatting.signed(metric, high)}]"

    return [
        formatting.signed(metric, difference.mean),
        str(difference.seeds),
        interval(difference.low, difference.high),
        _share(difference.p),
        p_holm,
        interval(difference.tasks_low, difference.tasks_high),
        _share(difference.tasks_p),
        _share(difference.permutation_p),
        interval(difference.bootstrap_low, difference.bootstrap_high),
    ]


def _share(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _setting_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _property_text(value: Any) -> str:
    """A property of the machine in words; one with parts, such as the commit, is a list of them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_property_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_property_text, value)) or "none"
    return "none" if value is None else _setting_text(value)


def _settings_by_default(settings: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """The settings that differ from their defaults, with these; then the others."""
    changed, usual = [], []
    for key, value in settings.items():
        text = _setting_text(value)
        if key in FIELDS and value == FIELDS[key].default:
            usual.append([key, text])
        else:
            changed.append([key, text, _setting_text(FIELDS[key].default) if key in FIELDS else ""])
    return changed, usual


def _row_settings(table: Table) -> Iterator[list[str]]:
    """Each row with the settings that differ from the baseline's; the baseline with all that rows vary."""
    baseline = table.baseline_row
    for row in table.rows:
        known = {} if row is baseline else baseline.settings
        texts = [
            f"{key} {_setting_text(value)}"
            for key, value in row.settings.items()
            if key not in known or value != known[key]
        ]
        yield [row.label, ", ".join(texts) or f"as {table.baseline}"]


def _published_numbers(table: Table) -> Iterator[list[str]]:
    for row in table.rows:
        for entry in row.published:
            number = formatting.score(entry.metric, entry.score, entry.half_width)
            mark = "" if entry.verified else f" {RECALLED}"
            yield [row.label, number + mark, entry.source, entry.row, _provenance(entry)]


def _provenance(entry: Published) -> str:
    origin = "read in a transcription" if entry.verified else f"{RECALLED} {FROM_MEMORY}"
    return f"{origin}; {entry.note}" if entry.note else origin


def _link(path: str) -> Markup:
    """A link to a file, or to a folder, relative to the page."""
    return Markup('<a href="{}">{}</a>').format(quote(path), formatting.strip_controls(path))


def _run_texts(cell: Cell) -> list[str]:
    return [
        str(cell.seed),
        _link(Path(cell.run).as_posix()),
        f"{cell.status}: {cell.reason}" if cell.reason else cell.status,
        f"{cell.steps:,}",
        "" if cell.step_s is None else formatting.duration(cell.step_s),
        "" if cell.steps_to_99 is None else f"{cell.steps_to_99:,}",
        cell.device,
    ]
