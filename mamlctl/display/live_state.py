"""The state of the live view, and how events change it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mamlctl.core import events
from mamlctl.core.events import Event

HISTORY = 40  # reports in a sparkline: more would not be readable at a glance
POINTS = 400  # reports in the loss chart, which has 2 columns of dots per terminal column


@dataclass(frozen=True)
class Work:
    """A piece of work in progress, and when it started."""

    progress: events.Progress
    since: float


@dataclass(frozen=True)
class Wait:
    """What the command waits for, or has waited for."""

    what: str
    since: float
    until: float | None = None  # None: it is not over


@dataclass(frozen=True)
class LossPoint:
    """The query losses of one report."""

    step: int
    query_losses: tuple[float, ...]  # index = inner steps taken


@dataclass(frozen=True)
class LiveState:
    """All that a frame shows; times are in seconds of one monotonic clock."""

    now: float
    started: float = 0.0
    doing: str = ""  # the work of the command
    waits: tuple[Wait, ...] = ()  # until the work starts, oldest first
    run: events.RunStarted | None = None
    step: int = 0
    epoch: int = 0
    reports: tuple[events.TrainReport, ...] = ()  # the latest ones, oldest first
    losses: tuple[LossPoint, ...] = ()  # of the whole run, oldest first, evenly thinned out
    validations: tuple[events.ValidationDone, ...] = ()
    work: tuple[Work, ...] = ()
    validation_s: float = 0.0  # how long the last validation took
    grid: events.GridChanged | None = None  # of `ablate`, whose cells train in other processes


def advance(state: LiveState, event: Event, now: float) -> LiveState:
    """The state after an event.

    Args:
        state: the state before it.
        event: what happened.
        now: the time in seconds, from a clock that never goes back.
    """
    match event:
        case events.Notice():
            return state  # printed above the frame, not in it
        case events.Waiting():
            # `compare` loads the data of each run, of which the last time is enough.
            others = [wait for wait in _over(state.waits, now) if wait.what != event.what]
            waits = (*others, Wait(event.what, now))
            return replace(state, now=now, doing=event.work or state.doing, waits=waits, work=())
        case events.GridChanged():
            return replace(state, now=now, grid=event, waits=(), work=())
        case events.Progress():
            return replace(_with_progress(state, event, now), waits=_over(state.waits, now))
        case events.RunStarted():
            waits = (*_over(state.waits, now), Wait("first meta-step", now))
            fresh = LiveState(now, now, state.doing, waits, event, event.first_step)
            return replace(fresh, epoch=event.first_step // event.steps_per_epoch)
        case events.MetaStepDone():
            return replace(state, now=now, step=event.step, epoch=event.epoch, waits=(), work=())
        case events.TrainReport():
            return replace(
                state,
                now=now,
                reports=(*state.reports, event)[-HISTORY:],
                losses=_thinned((*state.losses, LossPoint(event.step, event.query_losses))),
                waits=(),
                work=(),
            )
        case events.ValidationDone():
            took = now - state.work[-1].since if state.work else state.validation_s
            return replace(
                state,
                now=now,
                validations=(*state.validations, event)[-HISTORY:],
                waits=(),
                work=(),
                validation_s=took,
            )


def _over(waits: tuple[Wait, ...], now: float) -> tuple[Wait, ...]:
    """The waits, which are all over now."""
    return tuple(replace(wait, until=now) if wait.until is None else wait for wait in waits)


def _with_progress(state: LiveState, event: events.Progress, now: float) -> LiveState:
    started = [work.progress.what for work in state.work]
    if event.what in started:
        work = tuple(replace(w, progress=event) if w.progress.what == event.what else w for w in state.work)
    else:
        # It started at the previous event: the first progress is reported after the first part of the work.
        work = (*state.work, Work(event, state.now))
    return replace(state, now=now, work=work)


def _thinned(losses: tuple[LossPoint, ...]) -> tuple[LossPoint, ...]:
    """All points, or every second one if they are too many; the first and the latest are always kept."""
    return losses if len(losses) <= POINTS else (*losses[:-1:2], losses[-1])
