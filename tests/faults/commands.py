"""The commands that are attacked, and the results of the same commands without any fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import preloaded
from helpers.grid_cases import without_times

TIMEOUT_S = 120  # of one command, which takes about a second
MAMLCTL = "from mamlctl.__main__ import run; run()"
# The start of every command; before it, a signal would hit Python and not mamlctl.
READY = """
import sys
from pathlib import Path
from mamlctl.core.process import prepare_process
prepare_process()
Path(sys.argv.pop(1)).touch()
"""
SIZES = {"algo": "maml++", "ways": 3, "filters": 4, "inner-steps": 2, "meta-batch-size": 2}
LENGTH = {"epochs": 3, "steps-per-epoch": 8, "val-tasks": 4}
TINY = [word for name, value in (SIZES | LENGTH).items() for word in (f"--{name}", str(value))]
TINY += ["--dataset", "glyphs", "--report-every", "2"]
TASKS = ["--tasks", "8"]
ATTEMPTS = 10  # to stop a run in its third epoch
GRID = ["--grid", "inner_lr=0.1,0.4", "--seeds", "1", "--workers", "2", "--json", *TASKS]


@dataclass(frozen=True)
class Ended:
    """A command that has ended; the code is negative after a signal that nothing handled."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    def problem(self, *allowed: int) -> str:
        """What is wrong with its end, or ""."""
        if "Traceback" in self.err or "Error:" in self.err:
            return f"traceback: {self.err.strip()[-2000:]} ({' '.join(self.words)})"
        if self.code not in allowed:
            return f"exit code {self.code}: {self.err.strip()[-300:]} ({' '.join(self.words)})"
        return ""


class Running:
    """A command that is running in a fork of the preloaded Python."""

    def __init__(self, words: list[str], scratch: Path, program: str = MAMLCTL) -> None:
        self.words, name = tuple(map(str, words)), os.urandom(6).hex()
        self._out, self._err, self._ready = (scratch / f"{name}.{end}" for end in ("out", "err", "ready"))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = preloaded.Process(["-c", READY + program, self._ready, *words], out, err)

    def wait_until_ready(self) -> None:
        """Wait until mamlctl handles signals."""
        while not self._ready.exists() and self.process.poll() is None:
            time.sleep(0.001)

    def end(self) -> Ended:
        """Wait for the end; a command that does not end is killed, so its exit code is -9."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except TimeoutError:
            self.process.send_signal(signal.SIGKILL)
            code = self.process.wait()
        ended = Ended(
            self.words, code, *(path.read_text(errors="replace") for path in (self._out, self._err))
        )
        for path in (self._out, self._err, self._ready):
            path.unlink(missing_ok=True)
        return ended


def call(words: list[str], scratch: Path) -> Ended:
    """Run `mamlctl WORDS` to its end."""
    return Running(words, scratch).end()


def succeed(words: list[str], scratch: Path) -> Ended:
    """Run `mamlctl WORDS`, which must succeed, since no fault is involved."""
    ended = call(words, scratch)
    if problem := ended.problem(0):
        raise RuntimeError(f"without a fault: {problem}")
    return ended


def numbers(ended: Ended) -> Any:
    """The results in the JSON document of `eval`, without paths: the best model, then the ensemble."""
    return json.loads(ended.out)["results"]


def scores(ended: Ended) -> Any:
    """The scores and settings of every row in the JSON document of `compare`.

    Scores after every inner step are left out: a run that `compare` tests again has none.
    """
    names = ("label", "settings", "bn", "inner_steps")
    return [
        {name: row[name] for name in names}
        | {
            model: {name: value for name, value in row[model].items() if not name.startswith("per_step")}
            for model in ("best", "ensemble")
        }
        for row in json.loads(ended.out)["rows"]
    ]


class Undisturbed:
    """Runs, tables and data of commands that nothing disturbed, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        succeed(["fetch", "glyphs", "--data-root", str(self.data)], folder)
        self.train_words = [*TINY, "--data-root", str(self.data), "--offline"]
        began = time.monotonic()
        self.run = folder / "run"
        succeed(["train", *self.train_words, "--out", str(self.run)], folder)
        self.train_s = time.monotonic() - began
        self.last = (self.run / "checkpoints" / "last.pt").read_bytes()
        began = time.monotonic()
        tested = succeed(self.eval_words(self._copy("tested")), folder)
        self.eval_s = time.monotonic() - began
        self.numbers = numbers(tested)
        self.unfinished = self._unfinished_run()
        self.grid_words = ["ablate", *self.train_words, *GRID]
        began = time.monotonic()
        ended = succeed([*self.grid_words, "--out", str(folder / "grid")], folder)
        self.table, self.grid_s = without_times(json.loads(ended.out)), time.monotonic() - began
        self.pair = folder / "pair"  # of runs that are tested
        shutil.copytree(folder / "grid" / "cells", self.pair)
        began = time.monotonic()
        self.scores = scores(succeed(self.compare_words(self.pair), folder))
        self.compare_s = time.monotonic() - began

    def eval_words(self, run: Path) -> list[str]:
        """The words of the evaluation of a run."""
        return ["eval", str(run), *TASKS, "--json", "--data-root", str(self.data)]

    def compare_words(self, pair: Path) -> list[str]:
        """The words that compare the two runs in a folder."""
        runs = sorted(str(path.parent) for path in pair.glob("*/config.yaml"))
        return ["compare", *runs, *TASKS, "--json", "--data-root", str(self.data), "--offline"]

    def resume_words(self, run: Path) -> list[str]:
        """The words that finish a run, or start it if it was killed before it had settings."""
        if (run / "config.yaml").exists():
            return ["train", "--resume", str(run), "--data-root", str(self.data), "--offline"]
        return ["train", *self.train_words, "--out", str(run)]

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.run, self.folder / name))

    def _unfinished_run(self) -> Path:
        """The same run, stopped after its second epoch."""
        path = self.folder / "unfinished"
        for _ in range(ATTEMPTS):
            running = Running(["train", *self.train_words, "--out", str(path)], self.folder)
            while running.process.poll() is None and not (path / "checkpoints" / "epoch-0002.pt").exists():
                time.sleep(0.001)
            running.process.send_signal(signal.SIGTERM)
            if running.end().code == 143:
                return path
            shutil.rmtree(path)
        raise RuntimeError(
            f"the run ended {ATTEMPTS} times before it could be stopped after its second epoch"
        )
