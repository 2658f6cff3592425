"""A table's files: for people, for programs, for a paper."""

from __future__ import annotations

import json
from pathlib import Path

from mamlctl.core.files import finite, write_text
from mamlctl.report.export import document, to_csv, to_latex, to_markdown
from mamlctl.report.html_page import write_report
from mamlctl.report.table import Table

REPORT = "report.html"


def write_files(table: Table, folder: Path) -> list[Path]:
    """Write table.json, .csv, .md and .tex, plots/ and report.html into the folder; the last is the page.

    Nothing is written where all of them are there and hold the same table, since pictures take seconds.
    """
    texts = {
        "table.json": json.dumps(finite(document(table)), indent=2, allow_nan=False) + "\n",
        "table.csv": to_csv(table),
        "table.md": to_markdown(table),
        "table.tex": to_latex(table),
    }
    files = [*(folder / name for name in texts), folder / REPORT]
    is_complete = (folder / "plots").is_dir() and all(path.is_file() for path in files)
    if is_complete and files[0].read_text() == texts["table.json"]:
        return files
    write_report(table, folder)
    for name, text in reversed(texts.items()):  # table.json last: with it, all are there
        write_text(folder / name, text)
    return files
