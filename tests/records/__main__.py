"""Train and test what has no receipt yet, in slices; `make reproduce` runs it."""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mamlctl.core.errors import (
    STOP_EXIT_CODES,
    ExitCode,
    LockedError,
    MamlctlError,
    SettingsError,
    file_error,
)
from mamlctl.core.events import Event, Notice, OnEvent, TrainReport
from mamlctl.core.files import naming, write_text
from mamlctl.core.formatting import clock, plural
from mamlctl.core.literals import StopReason
from mamlctl.display.console import say, say_table, show_error, stderr_console
from mamlctl.display.displays import PlainDisplay
from mamlctl.engine.devices import device_problems, open_device
from mamlctl.experiments.interrupts import parse_duration
from records import experiments as listed
from records import receipts
from records.estimates import seconds_left, timed
from records.experiments import Experiment, experiments
from records.runs import RUNS, Place, RecordedRun

HEAD = ("experiment", "seed", "state", "meta-steps", "time left")


def without_receipt(chosen: Sequence[Experiment], runs: Path, folder: Path) -> list[RecordedRun]:
    """The runs that have no valid receipt yet, in order."""
    return [
        RecordedRun(experiment, seed, runs)
        for experiment in chosen
        for seed in experiment.seeds
        if receipts.valid_receipt(experiment, seed, folder) is None
    ]


def advance(
    run: RecordedRun, place: Place, seconds: Callable[[], float | None], folder: Path, on_event: OnEvent
) -> StopReason:
    """Train and test a run, and write its receipt.

    Args:
        run: the run.
        place: where to train and test it.
        seconds: returns the seconds until this call must stop; None for no limit.
        folder: the folder of the receipts.
        on_event: receives progress and notices.

    Returns:
        Why it has stopped; "" if the receipt is written.

    Raises:
        MamlctlError: the run cannot be trained or tested here.
    """
    if not run.is_trained:
        left = seconds()
        if left is not None and left <= 0:
            return "time limit"
        reason = run.train(place, left, on_event)
        if not run.is_trained:
            return reason
    for mode in run.untested:
        left = seconds()
        if left is not None and left <= 0:
            return "time limit"
        run.test(mode, place, on_event)
    file = receipts.receipt_file(run.experiment, run.seed, folder)
    write_text(file, receipts.text_of(receipts.receipt(run)))
    return ""


def work(
    left: Sequence[RecordedRun],
    place: Place,
    seconds: Callable[[], float | None],
    folder: Path,
    on_event: OnEvent,
) -> tuple[StopReason, ExitCode]:
    """Advance one run after the other until the time is used or a signal arrives.

    A run that fails, or that another process is training, does not stop the others.

    Args:
        left: the runs.
        place: where to train and test them.
        seconds: returns the seconds until this call must stop; None for no limit.
        folder: the folder of the receipts.
        on_event: receives progress and notices.

    Returns:
        Why it has stopped before the end of the list, or ""; and the exit code of the first failure.
    """
    code = ExitCode.OK
    for run in left:
        try:
            with run.writing():
                if receipts.valid_receipt(run.experiment, run.seed, folder):
                    continue  # another process has made it
                if reason := advance(run, place, seconds, folder, on_event):
                    return reason, code
            name = receipts.receipt_file(run.experiment, run.seed, folder)
            on_event(Notice(f"wrote {name}; `make docs` puts it into the tables"))
        except LockedError as error:
            show_error(stderr_console(), LockedError(error.message, hint="wait for it or stop it"))
            code = code or error.exit_code
        except MamlctlError as error:
            show_error(stderr_console(), error)
            code = code or error.exit_code
    return "", code


def show_left(left: Sequence[RecordedRun], place: Place, runs: Path, on_event: OnEvent | None) -> None:
    """Print the runs without a receipt and the time that they would take.

    Args:
        left: the runs.
        place: where they would run.
        runs: the folder of the run folders.
        on_event: receives notices; None: experiments that are not timed yet remain so.
    """
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not left:
        say(console, "nothing is left: every run has a receipt")
        return
    rows, known_s, unknown = [HEAD], 0.0, 0
    for run in left:
        times = timed(run.experiment, place, runs, on_event)
        seconds = seconds_left(run, times, place)
        known_s, unknown = known_s + (seconds or 0), unknown + (seconds is None)
        total = run.experiment.config.total_steps
        unknown_words = times.get("problem", "?" if times else "not timed yet")
        words = unknown_words if seconds is None else hours(seconds)
        rows.append((run.experiment.name, str(run.seed), state_of(run), f"{run.step:,}/{total:,}", words))
    say_table(console, rows, left=3)
    more = f", and {unknown} without a time (make reproduce LIST=1)" if unknown else ""
    count = len(left) - unknown
    say(console, f"left: {count} {plural(count, 'run')}, about {hours(known_s)} on {place.device}{more}")


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in a folder, which is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder):
        tempfile.TemporaryFile(dir=folder).close()  # has no name, so no other process sees it


def seconds_until(began: float, limit_s: float | None) -> Callable[[], float | None]:
    """A function that returns the rest of a time limit; None without a limit."""
    return lambda: None if limit_s is None else limit_s - (time.monotonic() - began)


def state_of(run: RecordedRun) -> str:
    """What the list says about a run."""
    return run.obstacle or ("trained" if run.is_trained else "begun" if run.step else "not begun")


def hours(seconds: float) -> str:
    """'4:12' for less than an hour, otherwise '13.4 h'."""
    return clock(seconds) if seconds < 3600 else f"{seconds / 3600:.1f} h"


def main(
    slice_: Annotated[
        str | None, typer.Option("--slice", help="Save and stop after this long, e.g. 9m (default: never).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    only: Annotated[str, typer.Option(help="One experiment, or a pattern such as 'sinusoid*'.")] = "*",
    list_: Annotated[bool, typer.Option("--list", help="Only print what is left.")] = False,
    data_root: Annotated[str | None, typer.Option(help="Folder of prepared data sets.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = RUNS,
    folder: Annotated[Path, typer.Option("--receipts", help="Folder of the receipts.")] = receipts.FOLDER,
    files: Annotated[Path, typer.Option("--experiments", help="Folder of experiments.")] = listed.FOLDER,
) -> None:
    """Train and test every experiment that has no receipt yet, and print what is left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
    began, log = time.monotonic(), stderr_console()
    display = PlainDisplay(log)

    def on_event(event: Event) -> None:
        if not isinstance(event, TrainReport):
            display(event)

    try:
        limit_s = None if slice_ is None else parse_duration(slice_, "--slice")
        if problems := device_problems(device, "float32"):
            raise SettingsError(problems)
        opened = open_device(device, "float32")
        place = Place(str(opened), data_root, shlex.join(["python", "-m", "records", *sys.argv[1:]]))
        chosen = experiments(files, only=only, device=opened.type)
        left = without_receipt(chosen, runs, folder)
        reason: StopReason = ""
        code = ExitCode.OK
        if left and not list_:
            check_writable(runs)  # before hours of training
            check_writable(folder)
            reason, code = work(left, place, seconds_until(began, limit_s), folder, on_event)
        # Timing can take minutes, and a stopped process should end soon.
        show_left(without_receipt(chosen, runs, folder), place, runs, on_event if list_ else None)
    except OSError as error:
        show_error(log, file_error(error))
        raise typer.Exit(ExitCode.FAILED) from error
    except MamlctlError as error:
        show_error(log, error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    raise typer.Exit(STOP_EXIT_CODES[reason] or code)


if __name__ == "__main__":
    typer.run(main)
