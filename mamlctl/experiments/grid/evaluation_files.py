"""The files of a stored evaluation: written together, and checked completely when they are read."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import finite, write_json, write_text
from mamlctl.core.literals import BatchNormMode, Model
from mamlctl.run_folder import SUMMARY, TASKS, upgrade

# What parsing a damaged file raises.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)
HINT = "remove that folder, so that the run is tested again"


def write_evaluation(
    folder: Path, summary: Mapping[str, Any], scores: Mapping[str, NDArray[np.float64]]
) -> None:
    """Write both files; the summary is written last, so an evaluation with a summary is complete.

    Args:
        folder: the folder of the evaluation.
        summary: the content of summary.json.
        scores: the score of every task, by model.
    """
    lines = [",".join(["task", *scores])]
    for task, values in enumerate(np.stack([*scores.values()], axis=1).tolist()):
        lines.append(",".join([str(task), *(f"{value:.6f}" for value in values)]))
    text = "\n".join(lines) + "\n"
    write_text(folder / TASKS, text)
    write_json(folder / SUMMARY, {**summary, "digest": _digest(summary, text)})


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a summary.json, in which every value that a table uses has its type.

    Raises MamlctlError if the file is damaged.
    """
    try:
        summary = upgrade(SUMMARY, json.loads(path.read_text(encoding="utf-8")))
        problem = _problem(summary)
    except DAMAGE as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise MamlctlError(f"{path.parent} is damaged: {SUMMARY}: {problem}", hint=HINT)
    return summary


def per_step_tasks(summary: Mapping[str, Any]) -> int:
    """How many tasks, the first ones, were scored after every inner step; older versions scored all so."""
    protocol, rows = summary["protocol"], summary["results"]
    return min(int(row.get("per_step_tasks", protocol["tasks"])) for row in rows)


def read_scores(folder: Path, summary: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """The score of every task, by model. Raises MamlctlError if a file is damaged."""
    try:
        text = (folder / TASKS).read_text(encoding="utf-8")
        problem = _problem_of_scores(text, summary)
        columns = [] if problem else list(zip(*csv.reader(StringIO(text)), strict=True))
        scores = {head: np.array(column, dtype=np.float64) for head, *column in columns[1:]}
    except DAMAGE as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise MamlctlError(f"{folder} is damaged: {TASKS}: {problem}", hint=HINT)
    return scores


def _digest(summary: Mapping[str, Any], tasks: str) -> str:
    """The digest of both files, without the digest itself."""
    content = {name: value for name, value in summary.items() if name != "digest"}
    text = json.dumps(finite(content), sort_keys=True)
    return hashlib.sha256(f"{text}\n{tasks}".encode(errors="surrogateescape")).hexdigest()


def _problem(summary: Mapping[str, Any]) -> str:
    """The first value of another type than the one that is written, or ""."""
    rows, protocol, notes = (summary.get(name) for name in ("results", "protocol", "notes"))
    if not isinstance(rows, list) or not rows:
        return f"results is {rows!r:.40}"
    if not isinstance(protocol, dict) or protocol.get("bn") not in get_args(BatchNormMode):
        return f"protocol is {protocol!r:.80}"
    if not isinstance(notes, list | None) or not all(isinstance(note, str) for note in notes or ()):
        return f"notes is {notes!r:.80}"
    return next(filter(None, map(_problem_of_row, rows)), "")


def _problem_of_row(row: object) -> str:
    if not isinstance(row, dict):
        return f"a result is {row!r:.40}"
    if not isinstance(row.get("model"), str) or row.get("kind") not in get_args(Model):
        return f"a result is of model {row.get('model')!r:.40}, {row.get('kind')!r:.40}"
    for name in ("epochs", "per_step"):
        values = row.get(name)
        if not isinstance(values, list) or not all(map(_is_number, values)):
            return f"{name} is {values!r:.40}"
    count, steps, tasks = len(row["per_step"]), row.get("inner_steps"), row.get("per_step_tasks", 1)
    if not isinstance(tasks, int) or isinstance(tasks, bool):
        return f"per_step_tasks is {tasks!r:.40}"
    fits = count - 1 == steps if tasks else count == 0
    return "" if fits else f"per_step has {count} values for {steps!r:.40} inner steps"


def _is_number(value: object) -> bool:
    """Whether a value is a number; null stands for one that is not finite."""
    if value is None or isinstance(value, float):
        return value is None or math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _problem_of_scores(text: str, summary: Mapping[str, Any]) -> str:
    """How the scores differ from those that were written, or ""."""
    if summary.get("digest", digest := _digest(summary, text)) != digest:
        return f"it or {SUMMARY} has changed since the test"
    rows = list(csv.reader(StringIO(text)))
    protocol = summary["protocol"]
    tasks = protocol.get("table", protocol).get("tasks")  # of a table, the different ones
    if [row[0] for row in rows[1:]] != [*map(str, range(len(rows) - 1))] or len(rows) - 1 != tasks:
        return f"it has {len(rows) - 1} lines of scores for {tasks!r:.40} tasks"
    models = [row["model"] for row in summary["results"]]
    return "" if rows[0][1:] == models else f"it has the columns {rows[0]!r:.80}"
