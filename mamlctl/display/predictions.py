"""Predictions for the user's own images and tables, as a table and as a JSON document."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.results import ClassifiedImage, ClassifyResult, ExportedModel, TablePrediction
from mamlctl.core.statistics import wilson95
from mamlctl.display.console import say, say_table

# What batch norm means for a user who asks about several images.
BN_NOTES = {
    "transductive": "bn transductive: each prediction depends on all query images",
    "support": "bn support: normalised like the support set; each prediction is independent of the others",
    "running": "bn running: normalised as in training; each prediction is independent of the others",
}


def show_classify_result(console: Console, result: ClassifyResult) -> None:
    """Print how the classes were learnt, one line per query image, and the files that were written."""
    say(console, (f"{result.algo} ({result.model})", "bold"), f"  {result.run}")
    say(console, _head_line(result))
    if result.images:
        say(console)
        say_table(console, _table(result, console.width if console.is_terminal else None), left=2)
        say(console)
    problems = [image.problem for image in result.images if image.problem]
    if problems:
        problems.append(f"left out: {len(problems)} of {len(result.images)} query images (unreadable)")
    pictures = [f"picture  {file}" for file in result.pictures]
    written = [f"written to {file}" for file in (result.csv, result.saved) if file]
    written += _export_lines(result.exported, "probabilities")
    for line in (*problems, _accuracy_line(result), BN_NOTES.get(result.bn, ""), *pictures, *written):
        if line:
            say(console, line)


def _export_lines(exported: ExportedModel | None, what: str) -> list[str]:
    """The exported file, and how its predictions were checked."""
    if exported is None:
        return []
    examples = f"{exported.checked} {formatting.plural(exported.checked, 'example')}"
    check = f"{what} within {exported.difference:.1g} of those of eval ({examples})"
    return [f"exported to {exported.file}: {check}"]


def _head_line(result: ClassifyResult) -> str:
    """The size of the support set, and how the classes were learnt from it."""
    fewest, most = min(result.shots), max(result.shots)
    shots = str(fewest) if fewest == most else f"{fewest} to {most}"
    each = f"{shots} {formatting.plural(most, 'support image')} each"
    taken = result.inner_steps
    steps = f"{taken} {formatting.plural(taken, 'inner step')}, " if taken else ""
    return f"{len(result.classes)} classes, {each}; {result.head}; {steps}bn {result.bn}"


def _table(result: ClassifyResult, width: int | None) -> list[list[str]]:
    """A head, then a row per file; file names are shortened in the middle if `width` is too small."""
    labelled = any(image.label is not None for image in result.images)
    rows = [["file", "predicted", "probability", *(["label", ""] if labelled else [])]]
    rows += [_image_texts(image, labelled) for image in result.images]
    if labelled:
        widest = max(len(row[3]) for row in rows)
        rows = [[*row[:3], row[3].ljust(widest), row[4]] for row in rows]
    if width is None:
        return rows
    others = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[1:]]
    room = max(width - sum(others) - 1, 12)
    return [[formatting.elide_middle(row[0], room), *row[1:]] for row in rows]


def _image_texts(image: ClassifiedImage, labelled: bool) -> list[str]:
    probability = "-" if image.probability is None else formatting.percent(image.probability)
    texts = [image.file, image.predicted or "-", probability]
    if labelled:
        is_wrong = None not in (image.label, image.predicted) and image.predicted != image.label
        texts += [image.label or "-", "wrong" if is_wrong else ""]
    return texts


def _accuracy_line(result: ClassifyResult) -> str:
    """The share of correct predictions; empty without labels."""
    if not result.labelled:
        return ""
    low, high = wilson95(result.right, result.labelled)
    share = formatting.percent(result.right / result.labelled)
    interval = f"95 % interval {100 * low:.1f} to {formatting.percent(high)}, Wilson"
    chance = formatting.percent(1 / len(result.classes))
    return f"accuracy {share}: {result.right} of {result.labelled} ({interval}); chance: {chance}"


def document(result: ClassifyResult) -> dict[str, Any]:
    """The whole result, for `--json`; accuracies and probabilities are 0..1."""
    labelled = result.labelled
    return {
        "format": 1,
        "run": result.run,
        "algo": result.algo,
        "model": result.model,
        "support": dict(zip(result.classes, result.shots, strict=True)),
        "support_left_out": result.left_out,
        "head": result.head,
        "inner_steps": result.inner_steps,
        "bn": result.bn,
        "predictions": [_image_document(image, result.classes) for image in result.images],
        "unreadable": result.unreadable,
        "labelled": labelled,
        "right": result.right if labelled else None,
        "accuracy": result.right / labelled if labelled else None,
        "wilson95": wilson95(result.right, labelled) if labelled else None,
        "pictures": result.pictures,
        "csv": result.csv,
        "saved": result.saved,
        "exported": None if result.exported is None else asdict(result.exported),
    }


def _image_document(image: ClassifiedImage, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "file": image.file,
        "predicted": image.predicted,
        "probability": image.probability,
        "probabilities": dict(zip(classes, image.probabilities, strict=False)),
        "label": image.label,
        "problem": image.problem,
    }


def show_table_prediction(console: Console, result: TablePrediction) -> None:
    """Print how the run was adapted, one line per query row, the errors, and the files that were written."""
    say(console, (f"{result.algo} ({result.model})", "bold"), f"  {result.run}")
    rows, steps = (
        formatting.plural(result.support_rows, "row"),
        formatting.plural(result.inner_steps, "inner step"),
    )
    say(console, f"adapted to {result.support_rows} {rows} in {result.inner_steps} {steps}")
    if result.x:
        _show_rows(console, result)
    for name, mse in zip(result.targets, result.mse or (), strict=False):
        root = f"root {math.sqrt(mse):.4g}"
        say(
            console,
            f"{formatting.one_line(name)}: mean squared error {mse:.4g} ({root}) over {len(result.x)} rows",
        )
    for file in result.pictures:
        say(console, f"picture  {file}")
    if result.csv:
        say(console, f"written to {result.csv}")
    for line in _export_lines(result.exported, "targets, in standard deviations,"):
        say(console, line)


def _show_rows(console: Console, result: TablePrediction) -> None:
    say(console)
    heads = [*result.inputs, *(f"predicted {name}" for name in result.targets)]
    parts = [result.x, result.predicted]
    if result.truth is not None:
        heads += [f"true {name}" for name in result.targets]
        parts.append(result.truth)
    lines = [[f"{value:.6g}" for part in row for value in part] for row in zip(*parts, strict=True)]
    say_table(console, [heads, *lines], left=0)
    say(console)


def table_document(result: TablePrediction) -> dict[str, Any]:
    """The whole result, for `--json`; all values have the units of the table."""
    rows = []
    for place, (x, predicted) in enumerate(zip(result.x, result.predicted, strict=True)):
        row = {"inputs": dict(zip(result.inputs, x, strict=True))}
        row["predicted"] = dict(zip(result.targets, predicted, strict=True))
        if result.truth is not None:
            row["targets"] = dict(zip(result.targets, result.truth[place], strict=True))
        rows.append(row)
    return {
        "format": 1,
        "run": result.run,
        "algo": result.algo,
        "model": result.model,
        "support_rows": result.support_rows,
        "inner_steps": result.inner_steps,
        "predictions": rows,
        "mse": None if result.mse is None else dict(zip(result.targets, result.mse, strict=True)),
        "pictures": result.pictures,
        "csv": result.csv,
        "exported": None if result.exported is None else asdict(result.exported),
    }
