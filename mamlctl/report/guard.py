"""The guard of `--fail-under` and `--fail-over`: whether every result reaches a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mamlctl.core.errors import MamlctlError
from mamlctl.core.formatting import one_line, plural
from mamlctl.core.literals import HIGHER_IS_BETTER, Metric
from mamlctl.core.results import EvalResult
from mamlctl.report.table import Row, Table

# Far below any digit of a limit: the mean of exactly 95 % may be computed as 0.9499999999999998.
ROUNDING = 1e-9
MOST_DIGITS = 12  # after the decimal point of a score


@dataclass(frozen=True)
class Limit:
    """The worst score that passes."""

    metric: Metric
    value: float  # an accuracy in percent, a mean squared error or a mean return

    @property
    def flag(self) -> str:
        """The option that sets the limit."""
        return "--fail-under" if self.metric in HIGHER_IS_BETTER else "--fail-over"

    def __str__(self) -> str:
        return f"{self.flag} {self.value:.12g}{self._unit}"

    def shortfall(self, score: float) -> str:
        """What is wrong with a score, an accuracy being 0..1; "" if it passes."""
        if not math.isfinite(score):
            return "has a score that is not finite"
        scaled = 100 * score if self.metric == "accuracy" else score
        missing = self.value - scaled if self.metric in HIGHER_IS_BETTER else scaled - self.value
        if missing <= ROUNDING:
            return ""
        digits = 2 if self.metric == "accuracy" else 3
        while digits < MOST_DIGITS and round(scaled, digits) == self.value:
            digits += 1
        return f"has {scaled:.{digits}f}{self._unit}"

    @property
    def _unit(self) -> str:
        return " %" if self.metric == "accuracy" else ""


class Ending(Protocol):
    """How training ended, as a run folder and a cell of a table describe it."""

    @property
    def status(self) -> str | None:
        """A RunStatus or a CellStatus; None before the first meta-step."""

    @property
    def reason(self) -> str:
        """Why training is not finished."""

    @property
    def diverged_at(self) -> int | None:
        """The meta-step whose loss or gradient was not finite."""


def check_evaluation(result: EvalResult, ending: Ending, limit: Limit) -> None:
    """Compare the best model of an evaluation with a limit.

    Args:
        result: the evaluation; one of its rows is the best model.
        ending: how the training of the run ended.
        limit: the limit.

    Raises:
        MamlctlError: the score does not reach the limit, or the training diverged or failed.
    """
    (best,) = (row for row in result.rows if row.kind == "best")
    _refuse({result.run: (_failure(ending), limit.shortfall(best.score))}, limit)


def check_table(table: Table, limit: Limit) -> None:
    """Compare the best model of every row of a table with a limit.

    Args:
        table: the table.
        limit: the limit.

    Raises:
        MamlctlError: a row does not reach the limit, or one of its runs diverged, failed or is not tested.
    """
    _refuse(
        {
            row.label: (_row_failure(row), limit.shortfall(row.best.mean) if row.best else "")
            for row in table.rows
        },
        limit,
    )


def _row_failure(row: Row) -> str:
    """Why a row does not pass, whatever its score; "" if the score decides."""
    for cell in row.cells:
        if failure := _failure(cell, f" with seed {cell.seed}"):
            return failure
    tested = len(row.best.per_seed) if row.best else 0
    if tested < len(row.cells):
        seeds = plural(len(row.cells), "seed")
        return f"is tested for {tested} of {len(row.cells)} {seeds}"
    return ""


def _failure(ending: Ending, seed: str = "") -> str:
    """How training diverged or failed, with the seed if there are several; "" if it did neither."""
    if ending.status == "diverged":
        return f"diverged{seed}" + (f" at meta-step {ending.diverged_at}" if ending.diverged_at else "")
    return f"failed{seed}: {ending.reason}" if ending.status == "failed" else ""


def _refuse(rows: Mapping[str, tuple[str, str]], limit: Limit) -> None:
    """Raise the error of the rows that failed, or else have a score with a shortfall; each is "" if not."""
    problems = [
        f"{label} {failure or shortfall}"
        for label, (failure, shortfall) in rows.items()
        if failure or shortfall
    ]
    if not problems:
        return
    hint = "train longer or with other settings"
    if any(shortfall and not failure for failure, shortfall in rows.values()):
        hint += f", or {'lower' if limit.metric in HIGHER_IS_BETTER else 'raise'} {limit.flag}"
    if len(problems) == 1:
        raise MamlctlError(f"{problems[0]}, but the limit is {limit}", hint=hint)
    lines = "\n".join(f"  {one_line(problem)}" for problem in problems)
    raise MamlctlError(f"{len(problems)} of {len(rows)} rows do not reach {limit}\n{lines}", hint=hint)
