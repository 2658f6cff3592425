"""Displays of events: a live view on a terminal, plain lines elsewhere, or no output."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from rich.console import Console, ConsoleDimensions, ConsoleOptions, Group, RenderResult
from rich.control import Control
from rich.live import Live
from rich.text import Text

from mamlctl.core import events, formatting
from mamlctl.core.events import Event
from mamlctl.display.console import say
from mamlctl.display.grid_view import changed_cells
from mamlctl.display.live_state import LiveState, advance
from mamlctl.display.training_view import render

REFRESH_PER_SECOND = 8  # looks smooth; one frame takes 3 to 4 ms of one core
ECHO = 2  # columns of the '^C' of a terminal; if they begin a new line, a part of the frame remains above
PROGRESS_EVERY_S = 5.0  # often enough to show that work continues, without filling a log

Clock = Callable[[], float]


class Display(Protocol):
    """Shows events while its `with` block runs."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return  # most displays have nothing to close


def open_display(console: Console, *, quiet: bool) -> Display:
    """A live view on a terminal, one plain line per report elsewhere, no output if quiet."""
    if quiet:
        return SilentDisplay()
    return LiveDisplay(console) if is_live(console) else PlainDisplay(console)


def is_live(console: Console) -> bool:
    """Whether a console can show a live view."""
    # With FORCE_COLOR, rich treats a pipe as a terminal: it may get colours, but no cursor movements.
    terminal = console.is_interactive and console.is_terminal and console.file.isatty()
    return terminal and console.encoding.startswith("utf")


class SilentDisplay(Display):
    """Ignores all events."""

    def __call__(self, event: Event) -> None:
        pass


class LiveDisplay(Display):
    """A view that is redrawn in place; notices scroll past above it, and its last frame remains."""

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
        if isinstance(event, events.Notice):
            say(self._console, formatting.one_line(event.text))
            return
        self.state = advance(self.state, event, self._clock())
        # Wait for the first event, so that a command without one leaves no trace.
        if not self._live.is_started:
            self._live.start(refresh=True)

    def __exit__(self, *exception: object) -> None:
        self.state = replace(self.state, waits=())
        # What a command has waited for is of no interest after its end, for example above an error.
        self._live.transient = self.state.run is None and self.state.grid is None and not self.state.work
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._size not in (None, options.size):
            # The terminal has re-wrapped the old frame, so its position is unknown: clear the screen.
            yield Control.home()
            yield Control.clear()
        self._size = options.size
        # One line less than the screen, because the cursor moves below the last frame at the end.
        width, height = options.size.width, options.size.height - 1
        frame = render(replace(self.state, now=self._clock()), width, height)
        yield frame
        imports = self.state.waits and self.state.run is None
        if imports or (len(frame.renderables) < height and _length(frame) > width - ECHO):
            yield ""  # the cursor waits below, where a shell prints its prompt if Ctrl-C ends the imports


def _length(frame: Group) -> int:
    """Terminal columns of the last line of a frame."""
    line = frame.renderables[-1] if frame.renderables else None
    return line.cell_len if isinstance(line, Text) else 0


@dataclass
class ProgressLog:
    """What a plain log has reported about a piece of work."""

    written_at: float  # time of the last line, in seconds of the display's clock
    tenth: int = 0  # of the work, at the last line
    done: int = 0  # at the last event, which may have had no line


@dataclass
class PlainDisplay(Display):
    """One line per report, for pipes and logs."""

    console: Console
    clock: Clock = time.monotonic
    _run: events.RunStarted | None = None
    _progress: dict[str, ProgressLog] = field(default_factory=dict)
    _grid: events.GridChanged | None = None

    def __call__(self, event: Event) -> None:
        line = self._log_line(event)
        if line:
            say(self.console, line)

    def _log_line(self, event: Event) -> str:
        match event:
            case events.Notice():
                return formatting.one_line(event.text)
            case events.Progress():
                return self._progress_line(event)
            case events.RunStarted():
                self._run = event
                return _run_line(event)
            case events.TrainReport():
                return _report_line(event, self._run)
            case events.ValidationDone():
                return _validation_line(event, self._run)
            case events.GridChanged():
                lines, self._grid = changed_cells(self._grid, event), event
                return "\n".join(lines)
            case events.Waiting() | events.MetaStepDone():
                return ""

    def _progress_line(self, event: events.Progress) -> str:
        """Empty unless the work takes long and another tenth of it is done."""
        now = self.clock()
        log = self._progress.get(event.what)
        if log is None or event.done < log.done:  # started or restarted
            log = self._progress[event.what] = ProgressLog(now)
        log.done = event.done
        if event.done == event.total:
            del self._progress[event.what]  # its next event belongs to new work of the same name
        tenth = 10 * event.done // event.total if event.total else log.tenth + 1
        if now - log.written_at < PROGRESS_EVERY_S or tenth <= log.tenth:
            return ""
        log.written_at, log.tenth = now, tenth
        share = f"  {100 * event.done // event.total} %" if event.total else ""
        amount = formatting.amount(event.done, event.total, event.unit, event.per_second)
        return f"{event.what}{share}  {amount}"


def _run_line(run: events.RunStarted) -> str:
    letters = f" ({' '.join(run.improvements)})" if run.improvements else ""
    parts = [
        f"run {formatting.one_line(run.run)}",
        f"{run.algo}{letters}",
        formatting.one_line(formatting.task(run.dataset, run.ways, run.shots)),
        f"{run.meta_batch_size} {formatting.plural(run.meta_batch_size, 'task')} per meta-step",
        f"{run.parameters:,} parameters",
        *([] if run.bn == "none" else [f"bn {run.bn}"]),
        run.device,
    ]
    if run.first_step:
        parts.append(f"resuming after step {run.first_step}")
    return "  ".join(parts)


def _report_line(report: events.TrainReport, run: events.RunStarted | None) -> str:
    steps = f"/{run.epochs * run.steps_per_epoch}" if run else ""
    epochs = f"/{run.epochs}" if run else ""
    metric = run.metric if run else "mse"
    returns = metric == "return"
    losses = ">".join(f"{formatting.reported(metric, value):.3f}" for value in report.query_losses)
    parts = [
        f"step {report.step}{steps}",
        f"epoch {report.epoch + 1}{epochs}",
        "" if returns or report.support_loss is None else f"support {report.support_loss:.3f}",
        f"{'return' if returns else 'query'} {losses}",
        "" if report.query_accuracy is None else f"acc {formatting.percent(report.query_accuracy)}",
        "" if report.meta_lr is None else f"lr {report.meta_lr:#.3g}",
        "" if report.first_order is None else f"order {1 if report.first_order else 2}",
        f"{report.tasks_per_second:.1f} tasks/s",
    ]
    return "  ".join(part for part in parts if part)


def _validation_line(done: events.ValidationDone, run: events.RunStarted | None) -> str:
    epochs = f"/{run.epochs}" if run else ""
    score = formatting.score(done.metric, done.val_score, done.val_ci95, 1)
    best = f"best {formatting.score(done.metric, done.best_val_score, None, 1)} at epoch {done.best_epoch}"
    bn = "" if done.bn == "none" else f", {done.bn}"
    return f"epoch {done.epoch}{epochs}  val {score} ({done.val_tasks} tasks{bn})  {best}"
