"""The user's own images told apart, as cells of a table, as lines, and as a document."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mamlctl.core import formatting
from mamlctl.core.results import ClassifiedImage, ClassifyResult
from mamlctl.core.statistics import wilson95
from mamlctl.display.console import say, say_table


def cells(result: ClassifyResult, width: int | None) -> list[list[str]]:
    """A row a file, under a head; files' names are shortened in their middle where `width` is too small."""
    labelled = any(image.label is not None for image in result.images)
    rows = [["file", "predicted", "probability", *(["label", ""] if labelled else [])]]
    rows += [_row(image, labelled) for image in result.images]
    if labelled:
        widest = max(len(row[3]) for row in rows)
        rows = [[*row[:3], row[3].ljust(widest), row[4]] for row in rows]
    others = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[1:]]
    room = max(width - sum(others) - 1, 12) if width is not None else None
    return [[formatting.elide_middle(row[0], room) if room else row[0], *row[1:]] for row in rows]


def _row(image: ClassifiedImage, labelled: bool) -> list[str]:
    told = [image.file, image.predicted or "-", "-"]
    if image.probability is not None:
        told[2] = formatting.percent(image.probability)
    wrong = image.label is not None and image.predicted is not None and image.predicted != image.label
    return told + ([image.label or "-", "wrong" if wrong else ""] if labelled else [])


def head_line(result: ClassifyResult) -> str:
    """What the support set is, and how it was learnt."""
    fewest, most = min(result.shots), max(result.shots)
    shots = str(fewest) if fewest == most else f"{fewest} to {most}"
    each = f"{shots} {formatting.plural(most, 'support image')} each"
    taken = result.inner_steps
    steps = f"{taken} {formatting.plural(taken, 'inner step')}, " if taken else ""
    return f"{len(result.classes)} classes, {each}; {result.head}; {steps}bn {result.bn}"


def bn_line(result: ClassifyResult) -> str:
    """What the statistics mean for who asks about several images."""
    return {
        "transductive": "bn transductive: each prediction depends on all the images asked about",
        "support": "bn support: normalised as the support set; each prediction is independent of the others",
        "running": "bn running: normalised as in training; each prediction is independent of the others",
    }.get(result.bn, "")


def accuracy_line(result: ClassifyResult) -> str:
    """The share that is right, if any labels are known."""
    if not result.labelled:
        return ""
    low, high = wilson95(result.right, result.labelled)
    share = formatting.percent(result.right / result.labelled)
    interval = f"95 % interval {100 * low:.1f} to {formatting.percent(high)}, Wilson"
    chance = formatting.percent(1 / len(result.classes))
    return f"accuracy {share}: {result.right} of {result.labelled} ({interval}); chance: {chance}"


def left_out_lines(result: ClassifyResult) -> list[str]:
    """Every file that could not be read, and their number."""
    problems = [image.problem for image in result.images if image.problem]
    if problems:
        problems.append(
            f"left out: {len(problems)} of {len(result.images)} query images, which cannot be read"
        )
    return problems


def document(result: ClassifyResult) -> dict[str, Any]:
    """The whole as one document."""
    known = result.labelled
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
        "predictions": [_entry(image, result.classes) for image in result.images],
        "unreadable": result.unreadable,
        "labelled": known,
        "right": result.right if known else None,
        "accuracy": result.right / known if known else None,
        "wilson95": wilson95(result.right, known) if known else None,
        "pictures": result.pictures,
        "csv": result.csv,
        "saved": result.saved,
    }


def _entry(image: ClassifiedImage, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "file": image.file,
        "predicted": image.predicted,
        "probability": image.probability,
        "probabilities": dict(zip(classes, image.probabilities, strict=False)),
        "label": image.label,
        "problem": image.problem,
    }


def last_lines(result: ClassifyResult) -> list[str]:
    """What stands below the table: what was left out, how right it is, what was written."""
    told = [*left_out_lines(result), accuracy_line(result), bn_line(result)]
    written = [f"written to {file}" for file in (result.csv, result.saved) if file]
    return [line for line in (*told, *(f"picture  {file}" for file in result.pictures), *written) if line]


def show_classify_result(console: Console, result: ClassifyResult) -> None:
    """How the classes were learnt, a row for each image, and what was written."""
    say(console, (f"{result.algo} ({result.model})", "bold"), f"  {result.run}")
    say(console, head_line(result))
    if result.images:
        say(console)
        table = cells(result, console.width if console.is_terminal else None)
        say_table(console, table, left=2)
        say(console)
    for line in last_lines(result):
        say(console, line)
