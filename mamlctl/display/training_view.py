"""The frames of the live view, as a pure function of its state, width and height."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from rich.console import Group
from rich.text import Text

from mamlctl.core import formatting
from mamlctl.core.events import RunStarted, TrainReport
from mamlctl.core.literals import METRIC_NAMES
from mamlctl.display import widgets
from mamlctl.display.grid_view import grid_frame
from mamlctl.display.live_state import HISTORY, LiveState, Work
from mamlctl.display.loss_chart import loss_chart
from mamlctl.display.widgets import COLD, DIM

MAX_WIDTH = 140  # terminal columns: on longer lines, a label and its number are too far apart
SMALL = 14  # lines: lower frames have only the bars and the chart without its title
LABEL = 16  # terminal columns for the name of a bar: 'epoch 1000/1000' and a space
RATES_LABEL = 20  # terminal columns for the name of a tensor
RATE_WIDTH = 9  # least terminal columns of a rate: '▄ 0.1000' and a space
# Lines that a tall terminal has left below the per-step losses, and those of the chart of their history.
TALL = 16
CHART = (8, 16)
GAPS = 5  # between the six sections
ORDERS = {True: "first order", False: "second order", None: ""}
NOT_FINITE = ("nan", "inf", "-inf")  # as an f-string writes them
ACCENT = "cyan"
BAD = "bold red"
GOOD = "green"

# For learnt rates: the colours of rates that are unchanged, and at least doubled.
UNCHANGED = (150, 150, 150)
HEAT = (215, 120, 30)


def render(state: LiveState, width: int, height: int) -> Group:
    """One frame, which fits the terminal.

    Args:
        state: what to show.
        width: of the terminal, in columns.
        height: of the terminal, in lines.
    """
    width = min(width, MAX_WIDTH)
    lines = _frame(state, width, height)[:height]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def _frame(state: LiveState, width: int, height: int) -> list[Text]:
    run = state.run
    if state.grid is not None and not state.work:
        return grid_frame(state.grid, width, height)
    if run is None:
        # The name of a file needs more room than the names of the bars during training.
        label = max([LABEL, *(len(work.progress.what) for work in state.work)])
        bars = [_work_bar(work, state.now, width, min(label, width // 3)) for work in state.work]
        doing = [Text(" " + formatting.elide_middle(formatting.one_line(state.doing), width - 2))]
        return [*(doing if state.doing else []), *_wait_lines(state, width), *bars][-height:]
    head, bars = _header(run, width), _bars(state, run, width)
    if not state.reports:
        trains = state.step > run.first_step
        return [*head, *bars, *_wait_lines(state, width), *([Text(" no report yet", DIM)] if trains else [])]
    report = state.reports[-1]
    if height < SMALL:
        steps = formatting.evenly_spaced(len(report.query_losses), height - 4)
        return [*head[:1], *bars[:2], *_chart(state.reports, run, ChartWidths.of(width, run), steps)]
    numbers, validation = _number_lines(state, run, report, width), _validation_lines(state, run, width)
    losses = len(report.query_losses)
    room = height - len(head) - len(bars) - len(numbers) - len(validation) - 2
    is_tall = room - min(losses, room // 2) >= TALL
    steps = formatting.evenly_spaced(losses, min(losses, room // 2 if is_tall else room))
    chart = _chart(state.reports, run, ChartWidths.of(width, run, with_history=not is_tall), steps)
    room -= len(steps)
    history = []
    if is_tall:
        chance = run.chance_loss(report.epoch)
        lines = min(max(room // 2 if report.rates else room - GAPS, CHART[0]), CHART[1])
        total = run.epochs * run.steps_per_epoch
        charted = loss_chart(state.losses, chance, total, width, lines, run.metric)
        history = [line.copy() for line in charted]
        room -= len(history)
    rates = _rate_lines(report, run.inner_lr, width, room - (GAPS if is_tall else 0))
    title = _chart_title(run, report, width)
    sections = [head, bars + numbers, [title, *chart], history, validation, rates]
    return _spaced([section for section in sections if section], room - len(rates))


def _wait_lines(state: LiveState, width: int) -> list[Text]:
    """What the command has waited for and how long, and what it waits for now; no line without waits."""
    if not state.waits:
        return []
    over = [f"{wait.what} {wait.until - wait.since:.1f} s" for wait in state.waits if wait.until is not None]
    # Whole seconds, since a number that changes with every frame would distract.
    now = [f"{wait.what} {int(state.now - wait.since)} s" for wait in state.waits if wait.until is None]
    while over and len(" · ".join([*over, *now])) + 2 > width:
        del over[0]
    between = " · " if over and now else ""
    return [Text.assemble(" ", (" · ".join(over) + between, DIM), (" · ".join(now), ACCENT))]


def _spaced(sections: list[list[Text]], spare: int) -> list[Text]:
    """The sections below each other, separated by empty lines if there are enough spare lines."""
    gap = [Text("")] if spare >= len(sections) - 1 else []
    return reduce(lambda above, below: [*above, *gap, *below], sections)


def _header(run: RunStarted, width: int) -> list[Text]:
    algo = Text.assemble(" ", (run.algo, f"bold {ACCENT}"), "  ", (" ".join(run.improvements), ACCENT))
    task = Text(formatting.task(formatting.one_line(run.dataset), run.ways, run.shots), "bold")
    machine = Text(f"{run.parameters:,} parameters · {run.device}", DIM)
    # Keep half of the line for the run's name, however long the device's description is.
    machine.truncate(max(width // 2 + 4, 1), overflow="ellipsis")
    name = Text(" " + formatting.elide_middle(formatting.one_line(run.run), width - machine.cell_len - 4))
    return [widgets.both_ends(algo, task, width), widgets.both_ends(name, machine, width)]


def _bars(state: LiveState, run: RunStarted, width: int) -> list[Text]:
    total = run.epochs * run.steps_per_epoch
    in_epoch = state.step - state.epoch * run.steps_per_epoch
    pace = _seconds_per_step(state, run)
    epoch_left = None if pace is None else pace * (run.steps_per_epoch - in_epoch)
    validations_left = run.epochs - state.step // run.steps_per_epoch
    run_left = None if pace is None else pace * (total - state.step) + validations_left * state.validation_s
    label = f"epoch {min(state.epoch + 1, run.epochs)}/{run.epochs}"
    epoch = _bar_line(
        label, in_epoch / run.steps_per_epoch, f"{in_epoch:,}/{run.steps_per_epoch:,}", epoch_left, width
    )
    whole = _bar_line("run", state.step / total, f"{state.step:,}/{total:,}", run_left, width)
    # The third line is kept when it is empty, so that the lines below it do not move.
    other = _work_bar(state.work[-1], state.now, width) if state.work else Text("")
    return [epoch, whole, other]


def _seconds_per_step(state: LiveState, run: RunStarted) -> float | None:
    """Median of the last five reports, because the first report includes the warm-up."""
    speeds = [report.tasks_per_second for report in state.reports[-5:] if report.tasks_per_second > 0]
    return run.meta_batch_size / statistics.median(speeds) if speeds else None


def _work_bar(work: Work, now: float, width: int, label: int = LABEL) -> Text:
    progress = work.progress
    done, total, speed = progress.done, progress.total, progress.per_second
    if speed is None:
        speed = done / (now - work.since) if now > work.since else 0.0
    left = (total - done) / speed if speed and total else None
    count = formatting.amount(done, total, progress.unit, progress.per_second)
    return _bar_line(progress.what, done / total if total else 0.0, count, left, width, label)


def _bar_line(
    what: str, share: float, count: str, left: float | None, width: int, label: int = LABEL
) -> Text:
    share = min(max(share, 0.0), 1.0)
    tail = (
        f"{count:>15}  {formatting.clock(left) + ' left':>13}" if share < 1 else f"{count:>15}  {'done':>13}"
    )
    length = max(width - label - len(tail) - 4, 4)
    full = int(share * length)
    half = "╸" if share * length - full >= 0.5 else ""
    name = Text(what)
    name.truncate(label, overflow="ellipsis", pad=True)
    # The remaining part is a thinner line, so that it can be distinguished without colour.
    thin = "─" * (length - full - len(half))
    return Text.assemble(" ", name, " ", ("━" * full + half, ACCENT), (thin, DIM), " ", tail)


def _number_lines(state: LiveState, run: RunStarted, report: TrainReport, width: int) -> list[Text]:
    per_step = run.meta_batch_size / report.tasks_per_second if report.tasks_per_second > 0 else math.nan
    rows = [
        _learning_numbers(run, report),
        [
            ("tasks/s", f"{report.tasks_per_second:,.1f}"),
            ("meta-step", formatting.duration(per_step)),
            ("memory", formatting.size(report.memory_bytes) if report.memory_bytes else "–"),
            ("elapsed", formatting.clock(state.now - state.started)),
        ],
    ]
    return [_number_line(row, width) for row in rows]


def _learning_numbers(run: RunStarted, report: TrainReport) -> list[tuple[str, str]]:
    rate = ("", "") if report.meta_lr is None else ("meta lr", f"{report.meta_lr:.3g}")
    order = ("", ORDERS[report.first_order])
    if run.metric == "return":
        # With MSL a weighted mean of those after 1, 2, ... inner steps, else that after the last one.
        score = ("mean return", formatting.loss(formatting.reported(run.metric, report.meta_loss)))
        return [score, order, rate, ("", "")]
    support = "–" if report.support_loss is None else formatting.loss(report.support_loss)
    return [("support loss", support), ("meta-loss", formatting.loss(report.meta_loss)), rate, order]


def _number_line(row: list[tuple[str, str]], width: int) -> Text:
    """Labels and values in columns that do not move when the numbers change."""
    line = Text(" ")
    for (label, value), column in zip(row, (22, 20, 19, 16), strict=True):
        text = Text.assemble(
            (f"{label} " if label else "", DIM), (value, BAD if value in NOT_FINITE else "bold")
        )
        text.truncate(column + max(width - 80, 0) // 6, pad=True)
        line.append_text(text)
    return line


@dataclass(frozen=True)
class ChartWidths:
    """Terminal columns for the three parts of the chart of per-step losses."""

    loss: int
    accuracy: int  # 0 for curves
    recent: int  # 0 if the history has a chart of its own

    @classmethod
    def of(cls, width: int, run: RunStarted, *, with_history: bool = True) -> ChartWidths:
        """Divide what numbers and gaps leave: 3/10 for the history, the rest 3 to 2.

        Args:
            width: of the chart, in columns.
            run: the run, which has no accuracy if it learns curves.
            with_history: whether each row ends with the history of its loss.
        """
        room = max(width - 40, 0)
        recent = min(HISTORY, room * 3 // 10) if with_history else 0
        accuracy = (room - recent) * 2 // 5 if run.guesses else 0
        return cls(room - recent - accuracy, accuracy, recent)


def _chart_title(run: RunStarted, report: TrainReport, width: int) -> Text:
    returns = run.metric == "return"
    note = METRIC_NAMES["return"] if returns else run.loss or formatting.loss_name("mse")
    if guesses := run.guesses_in(report.epoch):
        loss = run.chance_loss(report.epoch)
        of_loss = f"{run.loss} · ┊ chance: " if loss is None else f"┊ chance: {formatting.loss(loss)}, "
        note = f"{of_loss}{formatting.percent(1 / guesses)}"
    return widgets.rule("Per-step returns" if returns else "Per-step losses", note, width)


def _chart(
    reports: Sequence[TrainReport], run: RunStarted, widths: ChartWidths, steps: Sequence[int]
) -> list[Text]:
    accuracy = f"{'accuracy':<{widths.accuracy + 8}}  " if run.guesses else ""
    returns = run.metric == "return"
    name, history = ("return", "history") if returns else ("query loss", "loss history")
    heads = f" {'step':>4}  {'weight':<6}  {name:<{widths.loss + 10}}  {accuracy}{history[: widths.recent]}"
    return [Text(heads, DIM), *(_chart_row(reports, run, widths, step) for step in steps)]


def _chart_row(reports: Sequence[TrainReport], run: RunStarted, widths: ChartWidths, step: int) -> Text:
    report = reports[-1]
    loss = report.query_losses[step]
    # The scale always includes the loss of guessing, so that it does not change while the bars shrink. Where
    # that is unknown, as in regression, it ends at the largest loss in the history.
    guesses = run.guesses_in(report.epoch)
    chance = run.chance_loss(report.epoch) or 0.0
    shown = report.query_losses if chance else [loss for past in reports for loss in past.query_losses]
    scale = max([chance, *filter(math.isfinite, shown)]) or 1.0
    colour = widgets.step_colour(step, len(report.query_losses))
    line = Text.assemble(" ", f"{step:>4}", "  ", *_weight(report, step), "  ")
    number = formatting.loss(formatting.reported(run.metric, loss))
    line.append(f"{number:>9} ", "bold" if math.isfinite(loss) else BAD)
    line.append_text(widgets.bar(loss / scale, widths.loss, chance / scale if chance else None, colour))
    if guesses:
        accuracy = report.query_accuracies[step]
        line.append(f"  {formatting.percent(accuracy):>7} ", "bold" if math.isfinite(accuracy) else BAD)
        line.append_text(widgets.bar(accuracy, widths.accuracy, 1 / guesses, colour))
    losses = [past.query_losses[step] for past in reports if step < len(past.query_losses)]
    history = [formatting.reported(run.metric, past) for past in losses]
    return line.append("  ").append(widgets.spark(history[max(len(history) - widths.recent, 0) :]), colour)


def _weight(report: TrainReport, step: int) -> list[tuple[str, str]]:
    """The weight of the query loss after this step; a dash if it is 0."""
    weight = report.msl_weights[step - 1] if 1 <= step <= len(report.msl_weights) else 0.0
    if not weight > 0:
        return [("     –", DIM)]
    return [(widgets.block(weight), ACCENT), (f" {weight:.2f}", "")]


def _validation_lines(state: LiveState, run: RunStarted, width: int) -> list[Text]:
    bn = "" if run.bn == "none" else f"bn {run.bn} · "
    rule = widgets.rule("Validation", f"{run.val_tasks:,} tasks · {bn}95 % interval", width)
    if not state.validations:
        return [rule, Text(" none yet; it runs after every epoch", DIM)]
    last = state.validations[-1]
    line = Text.assemble(
        (" last ", DIM),
        (formatting.score(last.metric, last.val_score, last.val_ci95), "bold"),
        (f" epoch {last.epoch}   ", DIM),
        ("best ", DIM),
        (formatting.score(last.metric, last.best_val_score, last.best_val_ci95), f"bold {GOOD}"),
        (f" epoch {last.best_epoch}", DIM),
    )
    room = width - line.cell_len - 4
    line.append("   ").append(widgets.spark([v.val_score for v in state.validations][-max(room, 1) :]), GOOD)
    return [rule, line]


def _rate_lines(report: TrainReport, start: float, width: int, room: int) -> list[Text]:
    """Learnt inner learning rates, tensors by steps; nothing if fewer than three tensors would fit."""
    names = list(report.rates)
    if len(names) >= room:
        # Leave out biases first, because nearly all parameters are weights.
        names = [name for name in names if not name.endswith(".bias")]
    rows = formatting.evenly_spaced(len(names), min(len(names), room - 1))
    if not names or len(rows) < min(3, len(names)):
        return []
    note = f" start {start:g}"
    space = width - RATES_LABEL - 2 - len(note)
    columns = formatting.evenly_spaced(len(report.rates[names[0]]), max(space // RATE_WIDTH, 1))
    rate_width = min(space // len(columns), 14)
    heads = "".join(f" step {column + 1}".rjust(rate_width, "─") for column in columns)
    title = "Learnt inner rates"
    lines = [
        Text.assemble(" ", (title, "bold"), " ".ljust(RATES_LABEL - len(title), "─"), (heads + note, DIM))
    ]
    for row in rows:
        line = Text(" ")
        line.append_text(Text(formatting.elide_middle(names[row], RATES_LABEL - 1).ljust(RATES_LABEL)))
        for column in columns:
            line.append_text(_rate(report.rates[names[row]][column], start, rate_width))
        lines.append(line)
    return lines


def _rate(rate: float, start: float, width: int) -> Text:
    """A learnt rate with a block and a colour that show how far it is from the rate at the start."""
    if not math.isfinite(rate):
        return Text(f"· {rate:.4f}".rjust(width), BAD)
    change = min(max((rate - start) / start, -1.0), 1.0) if start > 0 else 0.0
    colour = widgets.between(UNCHANGED, COLD if change < 0 else HEAT, abs(change))
    # The block in the middle stands for changes of less than a seventh, the full one for a doubled rate.
    return Text(f"{widgets.block((1 + change) * 7 / 16)} {rate:.4f}".rjust(width), colour)
