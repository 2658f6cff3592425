"""A soak: one process trains, stops, resumes and tests runs, and records its memory and descriptors."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from faults.commands import TASKS, TINY
from mamlctl.cli.app import main

LINES = 12  # that are printed
WARM_UP = 0.1  # share of the time after which memory is compared
GROWTH = 1.1  # of memory after the warm-up, at most
LONGER = ["--epochs", "10", "--time-limit", "0.5s"]  # so that the run is stopped within an epoch


def run_command(words: list[str]) -> None:
    """Run a command in this process; it must succeed."""
    sys.argv = ["mamlctl", *words]
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(words)} ended with {end.code}: {err.getvalue()}") from end


def resident_mib() -> float:
    """The resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> int:
    """The number of open descriptors, without the one that lists them."""
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - a Path would open no fewer


def soak(minutes: Annotated[float, typer.Option(min=0, help="How long to soak.")] = 120) -> None:
    """Print memory and descriptors at regular times; fail if they grow after the first tenth of the time."""
    began, rounds, first = time.monotonic(), 0, None
    header = ("minutes", "rounds", "resident MiB", "descriptors")
    typer.echo(f"| {' | '.join(header)} |\n|{' ---: |' * len(header)}")
    printed = 0
    with tempfile.TemporaryDirectory(prefix="mamlctl-soak-") as folder:
        run, place = Path(folder) / "run", ["--data-root", str(Path(folder) / "data")]
        while True:
            run_command(["train", *TINY, *LONGER, *place, "--seed", str(rounds), "--out", str(run)])
            run_command(["train", "--resume", str(run), *place])
            run_command(["eval", str(run), *TASKS, *place])
            shutil.rmtree(run)
            rounds += 1
            share = (time.monotonic() - began) / (60 * minutes or 1)
            if share >= WARM_UP and first is None:
                first = resident_mib(), descriptors()
            if share >= printed / LINES:
                typer.echo(f"| {share * minutes:.1f} | {rounds} | {resident_mib():.0f} | {descriptors()} |")
                printed = int(share * LINES) + 1
            if share >= 1:
                break
    memory, files = first or (0, 0)
    raise typer.Exit(resident_mib() > GROWTH * memory or descriptors() > files)


if __name__ == "__main__":
    typer.run(soak)
