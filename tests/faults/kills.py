"""Signals at random moments; afterwards the same command must give the same result."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from helpers.data_cases import tiny_members, write_zip
from helpers.grid_cases import without_times
from helpers.server_cases import Page, Twist, serving

from faults.commands import Ended, Running, Undisturbed, call, numbers, scores
from mamlctl.core.files import is_locked

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST_KILLS = 4  # of one trial
WAIT_S = 60  # for the children of a killed grid
PARTS = {"images_background": 0, "images_evaluation": 1}  # folder in the archive -> seed of its images


def killed_ends(
    begin: Callable[[], Running], random: Random, usual_s: float, settle: Callable[[], None]
) -> Iterator[str]:
    """Start a command up to `MOST_KILLS` times and send a signal each time.

    Args:
        begin: starts the command.
        random: chooses the signals and their moments.
        usual_s: how long the command takes without a signal.
        settle: waits for what a killed command leaves behind.

    Yields:
        What is wrong with each end, or "".
    """
    for _ in range(random.randint(1, MOST_KILLS)):
        sent, running = random.choice(SIGNALS), begin()
        running.wait_until_ready()
        time.sleep(random.uniform(0, usual_s))
        running.process.send_signal(sent)
        # A signal that arrives after the end of the work changes nothing.
        yield running.end().problem(0, -sent if sent == signal.SIGKILL else 128 + sent)
        settle()


def compared(problems: Iterator[str], finish: Callable[[], Ended], difference: Callable[[Ended], str]) -> str:
    """The first problem of the killed commands, of the one that finishes the work, or of its result."""
    for problem in problems:
        if problem:
            return problem
    ended = finish()
    return ended.problem(0) or difference(ended)


def remnants(run: Path) -> list[str]:
    """The temporary files of killed processes in a run folder."""
    return [path.name for path in run.rglob(".*")]


def train(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Kill training, resume it, and compare last.pt bit by bit."""
    run = folder / "run"
    problems = killed_ends(
        lambda: Running(undisturbed.resume_words(run), folder),
        random,
        undisturbed.train_s,
        lambda: None,
    )

    def difference(ended: Ended) -> str:
        same = (run / "checkpoints" / "last.pt").read_bytes() == undisturbed.last
        left = remnants(run)
        return "" if same and not left else f"last.pt is equal: {same}; remnants: {left}"

    yield compared(problems, lambda: call(undisturbed.resume_words(run), folder), difference)


def evaluate(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Kill an evaluation, repeat it, and compare its numbers."""
    run = Path(shutil.copytree(undisturbed.run, folder / "run"))
    words = undisturbed.eval_words(run)
    problems = killed_ends(lambda: Running(words, folder), random, undisturbed.eval_s, lambda: None)

    def difference(ended: Ended) -> str:
        same, left = numbers(ended) == undisturbed.numbers, remnants(run)
        return "" if same and not left else f"the numbers are equal: {same}; remnants: {left}"

    yield compared(problems, lambda: call(words, folder), difference)


def compare(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Kill a comparison of runs that are not tested yet, repeat it, and compare its scores."""
    pair = Path(shutil.copytree(undisturbed.pair, folder / "pair"))
    for tests in pair.glob("*/eval"):
        shutil.rmtree(tests)
    words = undisturbed.compare_words(pair)
    problems = killed_ends(lambda: Running(words, folder), random, 2 * undisturbed.compare_s, lambda: None)

    def difference(ended: Ended) -> str:
        return "" if scores(ended) == undisturbed.scores else "compare printed other scores"

    yield compared(problems, lambda: call(words, folder), difference)


def ablate(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Kill a grid, repeat its command, and compare its table."""
    words = [*undisturbed.grid_words, "--out", str(folder / "grid")]

    def settle() -> None:
        give_up = time.monotonic() + WAIT_S
        while any(map(is_locked, folder.glob("grid/cells/*"))) and time.monotonic() < give_up:
            time.sleep(0.01)

    def difference(ended: Ended) -> str:
        return (
            ""
            if without_times(json.loads(ended.out)) == undisturbed.table
            else "ablate printed another table"
        )

    problems = killed_ends(lambda: Running(words, folder), random, undisturbed.grid_s, settle)
    yield compared(problems, lambda: call(words, folder), difference)


def fetch(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Kill the download of a small Omniglot from a local server, repeat it, and compare the pack."""
    pages = {}
    for name, seed in PARTS.items():
        path = write_zip(folder / f"{name}.zip", tiny_members(name, seed)[0])
        pages[f"/{path.name}"] = path.read_bytes()
    with serving() as server:
        for name, data in pages.items():
            slow = [Twist(pieces=16, pause_s=random.choice([0, 0.01])) for _ in range(MOST_KILLS)]
            server.pages[name] = Page(data, twists=slow)
        program = f"from faults.kills import fetch_small; fetch_small({server.address!r})"

        def begin(root: str) -> Running:
            return Running(["fetch", "omniglot", "--data-root", str(folder / root)], folder, program)

        began = time.monotonic()
        if problem := begin("whole").end().problem(0):
            yield f"without a signal: {problem}"
            return
        usual_s = time.monotonic() - began

        def difference(ended: Ended) -> str:
            whole, killed = (pack_digests(folder / root) for root in ("whole", "killed"))
            return "" if whole == killed else f"the data root contains {sorted(killed)}"

        problems = killed_ends(partial(begin, "killed"), random, usual_s, lambda: None)
        yield compared(problems, lambda: begin("killed").end(), difference)


def pack_digests(root: Path) -> dict[str, str]:
    """Digests of the files in a data root, without the sidecars, which contain times."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fetch_small(address: str) -> None:
    """Run `mamlctl`, for which Omniglot is a small one on the server with that address."""
    from helpers.data_cases import tiny_part

    from mamlctl.cli.app import run_program
    from mamlctl.data.fetching.downloads import Archive
    from mamlctl.data.sets import omniglot
    from mamlctl.data.sets.registry import DATA_SETS

    parts, archives = [], []
    for name, seed in PARTS.items():
        _, pixels = tiny_members(name, seed)
        parts.append(tiny_part(name, pixels))
        path = Path(sys.argv[-1]).with_name(f"{name}.zip")
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        archives.append(Archive(path.name, (f"{address}/{path.name}",), md5, path.stat().st_size))
    DATA_SETS["omniglot"] = replace(
        DATA_SETS["omniglot"],
        archives=lambda: tuple(archives),
        prepare=partial(omniglot.prepare, parts=tuple(parts)),
    )
    run_program()
