"""The files of a table: for people, for programs and for papers."""

from __future__ import annotations

import json
from pathlib import Path

from mamlctl.core.files import finite, read_text, write_text
from mamlctl.report.export import document, to_csv, to_latex, to_markdown
from mamlctl.report.html_page import write_report
from mamlctl.report.table import Table

REPORT = "report.html"


def write_files(table: Table, folder: Path) -> list[Path]:
    """Write table.json, .csv, .md and .tex, plots/ and report.html into the folder.

    Nothing is written if all of them exist for the same table, because figures take seconds.

    Returns:
        The paths of the five files, the page last.
    """
    texts = {
        "table.json": json.dumps(finite(document(table)), indent=2, allow_nan=False) + "\n",
        "table.csv": to_csv(table),
        "table.md": to_markdown(table),
        "table.tex": to_latex(table),
    }
    files = [*(folder / name for name in texts), folder / REPORT]
    is_complete = (folder / "plots").is_dir() and all(path.is_file() for path in files)
    if is_complete and read_text(files[0]) == texts["table.json"]:
        return files
    write_report(table, folder, files=list(texts))
    for name, text in reversed(texts.items()):  # table.json last: it shows that the others are complete
        write_text(folder / name, text)
    return files
