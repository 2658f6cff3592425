"""Trials of faults, and the table of their results."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.commands import Undisturbed

THREADS = 2  # each one starts one command at a time


class TrialRandom(Random):
    """The random numbers of a trial, and its seed, by which trials can share work."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# Yields, for each trial, what was lost, or "".
Attack = Callable[[Undisturbed, TrialRandom, Path], Iterator[str]]


class Skipped(Exception):
    """A fault that this machine does not allow; the text says why."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault and the function that causes it."""

    name: str
    attack: Attack
    share: float = 1  # of the time, relative to the other faults


@dataclass
class Row:
    """The results of one fault."""

    name: str
    tried: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)  # seed and what was lost
    skipped: str = ""

    @property
    def failed(self) -> bool:
        """Whether something was lost, or nothing was tried although the machine allows it."""
        return bool(self.lost) or not (self.tried or self.skipped)

    @property
    def cells(self) -> tuple[str, str, str]:
        """The cells of the table."""
        if not self.skipped:
            return self.name, str(self.tried), str(len(self.lost))
        if not self.tried:
            return self.name, f"skipped: {self.skipped}", ""
        return self.name, f"{self.tried}, then skipped: {self.skipped}", str(len(self.lost))


def attack(
    fault: Fault, undisturbed: Undisturbed, *, seed: int, seconds: float, trials: int | None = None
) -> Row:
    """Try a fault with the seeds `seed`, `seed + 1`, ..., at least once.

    Args:
        fault: the fault.
        undisturbed: what to compare with.
        seed: the first seed.
        seconds: start no trial after this time.
        trials: the number of seeds; None: until the time is over.
    """
    row, lock, give_up = Row(fault.name), threading.Lock(), time.monotonic() + seconds
    seeds = iter(range(seed, seed + (1 << 30 if trials is None else trials)))

    def work() -> None:
        while not row.skipped:
            with lock:
                number = next(seeds, None)
            late = trials is None and number != seed and time.monotonic() > give_up
            if number is None or late:
                return
            folder = Path(tempfile.mkdtemp(prefix=f"trial-{number}-", dir=undisturbed.folder))
            try:
                for lost in fault.attack(undisturbed, TrialRandom(number), folder):
                    with lock:
                        row.tried += 1
                        if lost:
                            row.lost.append((number, lost))
            except Skipped as reason:
                row.skipped = str(reason)
            except Exception as error:  # an unreadable result is a loss too
                with lock:
                    row.tried += 1
                    row.lost.append((number, f"{type(error).__name__}: {error}"))
            shutil.rmtree(folder, ignore_errors=True)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return row


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [("fault", "tried", "lost"), ("---", "---:", "---:"), *(row.cells for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
