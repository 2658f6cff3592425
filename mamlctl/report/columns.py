"""A table of runs in words: its columns, its rows in order, and what a reader must know about them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mamlctl.core import formatting
from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.report.table import Cell, Published, Row, Score, Table

SIGNIFICANT = 0.05  # of a p that Holm's correction has been through

RECALLED = "†"

ALWAYS = ("row", "seeds", "best", "diverged")  # the others are left out where no row has anything to say

SCORES = ("best", "sd", "ensemble", "difference", "p")  # side by side, and empty in a row without any score


@dataclass(frozen=True)
class RenderedRow:
    """A row of the table in words."""

    row: Row
    cells: Mapping[str, str]  # column -> words
    told: str  # why the row has no score; "" if it has one


@dataclass(frozen=True)
class RenderedTable:
    """A whole table in words."""

    heads: Mapping[str, str]  # column -> its head
    lines: tuple[RenderedRow, ...]
    sources: tuple[tuple[str, str], ...]  # the letters beside published numbers, and what they stand for
    remarks: tuple[str, ...]  # what became of each run that is not finished

    def texts(self) -> list[list[str]]:
        """The heads, then the rows."""
        return [[*self.heads.values()], *([line.cells[key] for key in self.heads] for line in self.lines)]


def cells(table: Table, sort: str | None = None) -> list[list[str]]:
    """The heads, then a list of words for each row, in the plan's order or sorted by a column.

    Raises SettingsError for a column that cannot be sorted by.
    """
    return grid(table, sort).texts()


def grid(table: Table, sort: str | None = None) -> RenderedTable:
    """The table in words, of the columns that tell something; `sort` as in `cells`."""
    rows = ordered(table, sort)
    letters: dict[str, str] = {}
    for row in rows:
        for entry in row.published[:1]:
            letters.setdefault(entry.source, letter(len(letters)))
    lines = tuple(_line(table, row, letters) for row in rows)
    heads = {
        key: head
        for key, head in _heads(table).items()
        if key in ALWAYS or any(line.cells[key] for line in lines)
    }
    sources = tuple((name, _source(rows, source)) for source, name in letters.items())
    return RenderedTable(heads, lines, sources, remarks(table))


def _source(rows: Sequence[Row], source: str) -> str:
    """A source, and what it says about those of its numbers that are shown."""
    shown = [row.published[0] for row in rows if row.published and row.published[0].source == source]
    notes = [f"{entry.row}: {entry.note}" for entry in shown if entry.note]
    return formatting.strip_controls("; ".join([source, *notes]))


def letter(place: int) -> str:
    """The name of a footnote: a to z, then a1 ..."""
    return chr(ord("a") + place % 26) + str(place // 26 or "")


def check_sort(sort: str | None) -> None:
    """Raises SettingsError for a column that rows cannot be sorted by; None is the plan's order."""
    if sort is not None and sort not in SORTS:
        otherwise = f"columns to sort by: {', '.join(SORTS)}"
        raise SettingsError([(f"cannot sort by '{sort}'", nearest(sort, SORTS, otherwise=otherwise))])


def ordered(table: Table, sort: str | None) -> list[Row]:
    """The rows in the plan's order, or best, fewest or first in the alphabet first, without a value last."""
    check_sort(sort)
    if sort is None:
        return list(table.rows)
    if sort == "row":
        return sorted(table.rows, key=lambda row: row.label)
    upwards = sort in ("steps", "seconds") or table.metric == "mse"

    def place(row: Row) -> tuple[bool, float]:
        value = SORTS[sort](table, row)
        if value is None or math.isnan(value):
            return True, 0.0
        return False, value if upwards else -value

    return sorted(table.rows, key=place)


def _difference(table: Table, row: Row) -> float | None:
    if row.label == table.baseline:
        return 0.0
    return row.best.difference.mean if row.best and row.best.difference else None


SORTS: Mapping[str, Callable[[Table, Row], float | None]] = {
    "row": lambda table, row: None,  # by its label instead
    "best": lambda table, row: row.best.mean if row.best else None,
    "ensemble": lambda table, row: row.ensemble.mean if row.ensemble else None,
    "difference": _difference,
    "published": lambda table, row: row.published[0].score if row.published else None,
    "steps": lambda table, row: row.steps_to_99,
    "seconds": lambda table, row: row.step_s,
}


def _heads(table: Table) -> dict[str, str]:
    unit = " %" if table.metric == "accuracy" else " mse"
    sizes = {row.ensemble_size for row in table.rows if row.ensemble}
    ensemble = f"ensemble-{sizes.pop()}" if len(sizes) == 1 else "ensemble"
    return {
        "row": "row",
        "seeds": "seeds",
        "bn": "bn",
        "inner_steps": "inner steps",
        "best": f"best{unit}",
        "sd": "sd",
        "ensemble": f"{ensemble}{unit}",
        "difference": "difference",
        "p": "p (Holm)",
        "published": f"published{unit}",
        "steps": "to 99 %",
        "seconds": "per step",
        "diverged": "diverged",
    }


def _line(table: Table, row: Row, letters: Mapping[str, str]) -> RenderedRow:
    told = "" if row.best or row.ensemble else told_of(row)
    alike = len({other.ensemble_size for other in table.rows if other.ensemble}) < 2
    size = "" if alike or not row.ensemble else f" ({row.ensemble_size})"
    scored = len(row.best.per_seed) if row.best else len(row.ensemble.per_seed) if row.ensemble else 0
    known = {
        "row": row.label,
        "seeds": str(scored) if scored == len(row.cells) else f"{scored} of {len(row.cells)}",
        "bn": row.bn if len({other.bn for other in table.rows}) > 1 else "",
        "inner_steps": str(row.inner_steps) if len({other.inner_steps for other in table.rows}) > 1 else "",
        "best": told or score_words(table.metric, row.best),
        "sd": deviation_words(table.metric, row.best),
        "ensemble": score_words(table.metric, row.ensemble) + size,
        "difference": difference_words(table, row, row.best),
        "p": p_words(row.best),
        "published": published_words(row.published[0], letters) if row.published else "",
        "steps": "" if row.steps_to_99 is None else f"{row.steps_to_99:,g}",
        "seconds": "" if row.step_s is None else formatting.duration(row.step_s),
        "diverged": str(row.divergences),
    }
    return RenderedRow(
        row, {key: " ".join(formatting.strip_controls(text).split()) for key, text in known.items()}, told
    )


def score_words(metric: str, score: Score | None) -> str:
    """'97.43 ± 0.36', the unit being in the column's head."""
    return "" if score is None else formatting.score(metric, score.mean, score.ci95).removesuffix(" %")


def deviation_words(metric: str, score: Score | None) -> str:
    """'0.21', nothing of one seed."""
    if score is None or score.deviation is None:
        return ""
    return f"{100 * score.deviation:.2f}" if metric == "accuracy" else f"{score.deviation:.3f}"


def difference_words(table: Table, row: Row, score: Score | None) -> str:
    """'+1.23 [+0.40, +2.06] *' in points, 'baseline', or nothing."""
    if score is None or score.difference is None:
        return "baseline" if score and row.label == table.baseline else ""
    mean, low, high = (
        signed(table.metric, value)
        for value in (score.difference.mean, score.difference.low, score.difference.high)
    )
    paired = score.difference.seeds
    apart = "" if paired == most_seeds(table) else f" ({paired} {formatting.plural(paired, 'seed')})"
    return f"{mean} [{low}, {high}]{apart}{' *' if significant(score) else ''}"


def most_seeds(table: Table) -> int:
    """Seeds of the row that has been tested with most of them."""
    return max((len(row.best.per_seed) for row in table.rows if row.best), default=0)


def signed(metric: str, value: float) -> str:
    """'+1.23' points or '-0.012' of an mse; '?' where a single value gives no interval."""
    if not math.isfinite(value):
        return "?"
    scale, digits = (100, 2) if metric == "accuracy" else (1, 3)
    return f"{round(scale * value, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.00


def significant(score: Score | None) -> bool:
    """Whether the difference's corrected p is below 0.05."""
    return score is not None and score.p_holm is not None and score.p_holm < SIGNIFICANT


def p_words(score: Score | None) -> str:
    """'0.012' or '<0.001'."""
    if score is None or score.p_holm is None or math.isnan(score.p_holm):
        return ""
    return "<0.001" if score.p_holm < 0.001 else f"{score.p_holm:.3f}"


def published_words(entry: Published, letters: Mapping[str, str]) -> str:
    """'95.77 ± 0.38 a†': a's number, recalled and not verified."""
    text = formatting.score(entry.metric, entry.score, entry.half_width).removesuffix(" %")
    return f"{text} {letters.get(entry.source, '')}{'' if entry.verified else RECALLED}".rstrip()


def told_of(row: Row) -> str:
    """Why a row has no score: 'diverged at meta-step 40, 52; 1 missing'."""
    steps = sorted({diverged_at(cell) for cell in row.cells if cell.status == "diverged"})
    parts = [f"diverged at meta-step {', '.join(map(str, steps))}"] if steps else []
    others = [cell.status for cell in row.cells if cell.status != "diverged"]
    for status in dict.fromkeys(others):
        name = "not tested" if status == "finished" else status
        parts.append(name if len(row.cells) == 1 else f"{others.count(status)} {name}")
    return formatting.strip_controls("; ".join(parts) or "missing")


def diverged_at(cell: Cell) -> int:
    """The meta-step at which a training diverged, which may be later than its last good one."""
    said = re.search(r"meta-step (\d+)", cell.reason)
    return int(said[1]) if said else cell.steps


def remarks(table: Table) -> tuple[str, ...]:
    """A line for each way in which runs of a row are not finished, and one for all that are missing."""
    begun: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        for cell in row.cells:
            if cell.status not in ("finished", "missing"):
                begun.setdefault((row.label, _state(cell)), []).append(str(cell.seed))
    lines = [
        f"{label}, {formatting.plural(len(seeds), 'seed')} {', '.join(seeds)}: {state}"
        for (label, state), seeds in begun.items()
    ]
    every = [cell.status for row in table.rows for cell in row.cells]
    missing = every.count("missing")
    lines += [f"{missing} of {len(every)} runs {'is' if missing == 1 else 'are'} missing"] * (missing > 0)
    return tuple(map(formatting.strip_controls, lines))


def _state(cell: Cell) -> str:
    if cell.status == "diverged":
        at = f"diverged at meta-step {diverged_at(cell)}"
        rest = cell.reason.partition(at)[2].lstrip(": ") if at in cell.reason else cell.reason
        return f"{at}{': ' * bool(rest)}{rest}"
    return f"{cell.status} after {cell.steps} meta-steps{': ' * bool(cell.reason)}{cell.reason}"


def head_parts(table: Table) -> list[str]:
    """What all rows of the table share, for its head line."""
    seeds = sorted({cell.seed for row in table.rows for cell in row.cells})
    devices = list(dict.fromkeys(cell.device for row in table.rows for cell in row.cells if cell.device))
    bn = {row.bn for row in table.rows}
    drawn = "tasks without a shared image as far as they go" if table.disjoint else "tasks"
    parts = [
        formatting.task(table.dataset, table.ways, table.shots),
        f"{table.queries} {formatting.plural(table.queries, 'query')}{' a class' if table.ways > 1 else ''}",
        f"{table.split} split",
        f"{table.tasks:,} {drawn} (seed {table.eval_seed})",
        f"{table.label_permutations} orders of labels" if table.label_permutations > 1 else "",
        f"bn {bn.pop()}" if len(bn) == 1 else "",
        f"{formatting.plural(len(seeds), 'seed')} {' '.join(map(str, seeds))}" if seeds else "",
        devices[0] if len(devices) == 1 else f"{len(devices)} kinds of devices" if devices else "",
    ]
    return [formatting.strip_controls(part) for part in parts if part]


def legend(table: Table, shown: Mapping[str, str]) -> list[str]:
    """What the numbers of the shown columns mean."""
    accuracy = table.metric == "accuracy"
    alone = most_seeds(table) < 2
    new = "new tasks alone, since there is one seed" if alone else "new seeds and new tasks"
    better = "" if accuracy else "; less is better"
    fewer = any(row.best and row.best.difference and row.best.difference.seeds == 1 for row in table.rows)
    one = "; on 1 seed, for new tasks alone and without p" if fewer and not alone else ""
    told = {
        "best": f"±: 95 % interval over tasks of the seeds' mean, of these very models{better}.",
        "sd": "sd: standard deviation over seeds.",
        "difference": f"difference: to {table.baseline} on the same tasks and seeds"
        f"{', in points' if accuracy else ''}, with its 95 % interval for {new}; "
        f"*: p below {SIGNIFICANT} after Holm's correction over the rows{one}.",
        "published": "published: what the source prints, at its own length of training, and its ± is not "
        f"always a 95 % interval; {RECALLED}: recalled, not verified.",
        "steps": "to 99 %: meta-steps to the first validation at 99 % of the last one's score, "
        "median over seeds.",
        "seconds": "per step: median time of a meta-step, of the median seed.",
    }
    return [formatting.strip_controls(line) for key, line in told.items() if key in shown]
