"""The only place that speaks: events become a live view or plain lines, results become words or JSON."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.text import Text

from mamlctl import predictions, words
from mamlctl.errors import MamlctlError
from mamlctl.grid_view import changed_cells
from mamlctl.listing import data_set_cells
from mamlctl.live import LiveState, advance, render
from mamlctl.records import (
    EvalResult,
    EvalRow,
    Event,
    GridChanged,
    MetaStepDone,
    Notice,
    OwnResult,
    Progress,
    RunStarted,
    TrainReport,
    TrainResult,
    ValidationDone,
)
from mamlctl.runs import finite

REFRESH_PER_SECOND = 8  # looks fluent; one frame takes 3 to 4 ms of one core
PROGRESS_EVERY_S = 5.0  # so that a log tells that something goes on without being filled by it

Clock = Callable[[], float]


class Display(Protocol):
    """Draws events between `with` and its end."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_display(console: Console, *, quiet: bool) -> Display:
    """A live view on a terminal, one plain line per report elsewhere, nothing at all when quiet."""
    if quiet:
        return SilentDisplay()
    # FORCE_COLOR makes rich take a pipe for a terminal; colours may go there, cursor movements may not.
    terminal = console.is_interactive and console.is_terminal and console.file.isatty()
    if terminal and console.encoding.startswith("utf"):
        return LiveDisplay(console)
    return PlainDisplay(console)


class SilentDisplay:
    """Draws nothing."""

    def __call__(self, event: Event) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing."""


class LiveDisplay:
    """A view that moves in place; notices scroll by above it, its last state stays."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._size: ConsoleDimensions | None = None
        self.state = LiveState(clock())
        self._live = Live(
            console=console,
            get_renderable=lambda: self,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,  # data goes to stdout, and this view is on stderr
            vertical_overflow="crop",
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            say(self._console, event.text)
            return
        self.state = advance(self.state, event, self._clock())
        # Not before there is something to draw: a command that fails at once shows its error alone.
        if not self._live.is_started:
            self._live.start(refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._size not in (None, options.size):
            # The terminal has re-wrapped the old frame, so nobody knows where it began: a clean screen.
            yield Control.home()
            yield Control.clear()
        self._size = options.size
        # One line less than the screen, since the cursor goes below the last frame at the end.
        yield render(replace(self.state, now=self._clock()), options.size.width, options.size.height - 1)


@dataclass
class Told:
    """What a plain log has said about a piece of work."""

    at: float
    tenth: int = 0
    done: int = 0


@dataclass
class PlainDisplay:
    """One line per report, for pipes and logs."""

    console: Console
    clock: Clock = time.monotonic
    _run: RunStarted | None = None
    _told: dict[str, Told] = field(default_factory=dict)
    _grid: GridChanged | None = None

    def __call__(self, event: Event) -> None:
        line = self._line(event)
        if line:
            say(self.console, line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing: every line is flushed when written."""

    def _line(self, event: Event) -> str:
        match event:
            case Notice():
                return event.text
            case Progress():
                return self._progress_line(event)
            case RunStarted():
                self._run = event
                return _run_line(event)
            case TrainReport():
                return _report_line(event, self._run)
            case ValidationDone():
                return _validation_line(event, self._run)
            case GridChanged():
                told, self._grid = changed_cells(self._grid, event), event
                return "\n".join(told)
            case MetaStepDone():
                return ""

    def _progress_line(self, event: Progress) -> str:
        """Empty unless the work takes long and a further tenth of it is done."""
        now = self.clock()
        told = self._told.get(event.what)
        if told is None or event.done < told.done:  # begun, or begun again
            told = self._told[event.what] = Told(now)
        told.done = event.done
        tenth = 10 * event.done // event.total if event.total else told.tenth + 1
        if now - told.at < PROGRESS_EVERY_S or tenth <= told.tenth:
            return ""
        told.at, told.tenth = now, tenth
        share = f"  {100 * event.done // event.total} %" if event.total else ""
        return f"{event.what}{share}  {words.amount(event.done, event.total, event.unit, event.per_second)}"


def _run_line(run: RunStarted) -> str:
    letters = f" ({' '.join(run.improvements)})" if run.improvements else ""
    parts = [
        f"run {run.run}",
        f"{run.algo}{letters}",
        words.task(run.dataset, run.ways, run.shots),
        f"{run.meta_batch_size} tasks a meta-step",
        f"{run.parameters:,} parameters",
        f"bn {run.bn}",
        run.device,
    ]
    if run.first_step:
        parts.append(f"goes on after step {run.first_step}")
    return "  ".join(parts)


def _report_line(report: TrainReport, run: RunStarted | None) -> str:
    steps = f"/{run.epochs * run.steps_per_epoch}" if run else ""
    epochs = f"/{run.epochs}" if run else ""
    losses = ">".join(f"{value:.3f}" for value in report.query_losses)
    parts = [
        f"step {report.step}{steps}",
        f"epoch {report.epoch + 1}{epochs}",
        "" if report.support_loss is None else f"support {report.support_loss:.3f}",
        f"query {losses}",
        "" if report.query_accuracy is None else f"acc {words.percent(report.query_accuracy)}",
        f"lr {report.meta_lr:#.3g}",
        "" if report.first_order is None else f"order {1 if report.first_order else 2}",
        f"{report.tasks_per_second:.1f} tasks/s",
    ]
    return "  ".join(part for part in parts if part)


def _validation_line(done: ValidationDone, run: RunStarted | None) -> str:
    epochs = f"/{run.epochs}" if run else ""
    score = words.score(done.metric, done.val_score, done.val_ci95, 1)
    best = f"best {words.score(done.metric, done.best_val_score, None, 1)} at epoch {done.best_epoch}"
    return f"epoch {done.epoch}{epochs}  val {score} ({done.val_tasks} tasks, {done.bn})  {best}"


def show_error(console: Console, error: MamlctlError) -> None:
    """The fact, then the way out."""
    say(console, ("error:", "bold red"), f" {error.message}")
    if error.hint:
        say(console, ("hint:", "bold cyan"), f"  {error.hint}")


def show_train_result(console: Console, result: TrainResult) -> None:
    """How training ended, and the command to type next."""
    why = f" ({result.reason})" if result.reason else ""
    run = shlex.quote(result.run)
    say(console, (f"{result.status}{why}", "bold"), f"  {result.run}")
    took = words.duration(result.seconds)
    say(console, f"steps  {result.step:,} of {result.total_steps:,} meta-steps in {took}")
    if result.best_val_score is None:
        say(console, "best   no validation yet")
    else:
        score = words.score(result.metric, result.best_val_score, result.best_val_ci95)
        where = f" after epoch {result.best_epoch} ({result.val_tasks} validation tasks, {result.bn})"
        say(console, "best   ", (score, "bold green"), where)
    if result.status == "interrupted":
        say(console, "go on  ", (f"mamlctl train --resume {run}", "cyan"))
    say(console, "test   ", (f"mamlctl eval {run}", "cyan"))


def show_eval_result(console: Console, result: EvalResult) -> None:
    """One row per model, then the accuracy after each inner step."""
    first = result.rows[0]
    queries = f", {first.queries} queries{' a class' if first.ways > 1 else ''}"
    task = words.task(result.dataset, first.ways, first.shots)
    say(console, (task, "bold"), f"{queries}  {result.algo}  {result.run}")
    for note in result.notes:
        say(console, note)
    say(console)
    named = {"accuracy": "accuracy", "mse": "mean squared error"}[first.metric]
    heads = ["model", named, "tasks", "split", "bn", "inner steps"]
    say_table(console, [heads, *map(_eval_cells, result.rows)], left=2)
    say(console)
    say(console, (f"{named}{' in %' if first.metric == 'accuracy' else ''} after each inner step", "bold"))
    # Blocks of columns instead of lines that a terminal would break.
    longest = max(len(row.model) for row in result.rows)
    columns = max((console.width - longest) // 8, 1) if console.is_terminal else len(first.per_step)
    for begin in range(0, len(first.per_step), columns):
        steps = range(begin, min(begin + columns, len(first.per_step)))
        table = [["model", *map(str, steps)]]
        scale = 100 if first.metric == "accuracy" else 1
        table += [[row.model, *(f"{scale * row.per_step[at]:.2f}" for at in steps)] for row in result.rows]
        say_table(console, table, left=1, widest=6)
    say(console)
    for row in result.rows:
        if row.epochs:
            say(console, f"{row.model}: epoch {', '.join(map(str, row.epochs))}")
    chance = f"; chance: {words.percent(1 / first.ways, 2)}" if first.metric == "accuracy" else ""
    say(
        console,
        f"intervals: 95 % over tasks{chance}; {words.duration(result.seconds)}; written to {result.folder}",
    )
    for picture in result.pictures:
        say(console, f"picture  {picture}")


def show_data_sets(console: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """A table, or where the terminal is too narrow for it, a block of lines for each data set."""
    heads, *rows = data_set_cells(entries)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if not console.is_terminal or sum(widths) + 2 * len(widths) <= console.width:
        say_table(console, [heads, *rows], left=len(heads))
    else:
        for row in rows:
            say(console, (row[0], "bold"))
            for head, cell in zip(heads[1:], row[1:], strict=True):
                say(console, (f"  {head:<10}", "dim"), cell)
    say(console, f"prepared data sets lie in {entries[0]['folder']}")


def show_own_result(console: Console, result: OwnResult) -> None:
    """How the classes were learnt, a row for each image, and what was written."""
    say(console, (f"{result.algo} ({result.model})", "bold"), f"  {result.run}")
    say(console, predictions.head_line(result))
    if result.images:
        say(console)
        table = predictions.cells(result, console.width if console.is_terminal else None)
        say_table(console, table, left=2)
        say(console)
    for line in predictions.last_lines(result):
        say(console, line)


def _eval_cells(row: EvalRow) -> list[str]:
    return [
        row.model,
        words.score(row.metric, row.score, row.ci95),
        str(row.tasks),
        row.split,
        row.bn,
        str(row.inner_steps),
    ]


def say_table(console: Console, rows: Sequence[Sequence[str]], *, left: int, widest: int = 0) -> None:
    """Aligned columns, the first `left` of them and all words to the left, under a dim head."""
    widths = [
        max(widest * (place >= left), *map(len, column))
        for place, column in enumerate(zip(*rows, strict=True))
    ]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if place >= left else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(console, ("  ".join(cells).rstrip(), "dim" if number == 0 else ""))


def write_json(stream: TextIO, document: Mapping[str, Any]) -> None:
    """One document on one line; a number that is not finite becomes null, which JSON has a word for."""
    stream.write(json.dumps(finite(document), allow_nan=False) + "\n")
    stream.flush()


def say(console: Console, *parts: str | tuple[str, str]) -> None:
    """One line, as it is: no markup, no highlighting, no wrapping; flushed by rich."""
    line = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        # A pipe's encoding may lack a character such as ±; that is no reason to fail.
        known = words.safe(text).encode(console.encoding, "replace").decode(console.encoding)
        line.append(known, style)
    console.print(line, soft_wrap=True)
