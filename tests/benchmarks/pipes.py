"""A worker process that answers one line with another, and sleeps in between.

Every learner has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Document = dict[str, Any]
Answer = Callable[[Document], Document]
TESTS = Path(__file__).resolve().parents[1]


class WorkerFailed(Exception):
    """A worker ended without an answer: its last words."""


class Worker:
    """The parent's end."""

    def __init__(self, module: str, opening: Document) -> None:
        """Start `python -m module` and send it `opening`, whose answer is the first to be heard."""
        # OMP_WAIT_POLICY stays as it is: a worker that waits here uses 0.5 % of a core without it, and with
        # PASSIVE a meta-step takes 0.88 instead of 0.68 s (omniglot-5w1s, medians of 9 in turn, 2 cores).
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._tell(opening)

    def ask(self, question: Document) -> Document:
        """The answer to one question. Raises WorkerFailed."""
        self._tell(question)
        return self.hear()

    def _tell(self, question: Document) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # `hear` finds out that the worker has ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def hear(self) -> Document:
        """The next answer. Raises WorkerFailed."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._last_words())
        answer: Document = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        # A worker that the kernel killed, for memory usually, says nothing.
        return f"killed by signal {-status}" if status < 0 else (lines or [f"exit status {status}"])[-1]

    def close(self) -> None:
        """The worker ends when nothing more can be asked."""
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()  # it may be in the middle of a long meta-step
        self.close()


def serve(open_worker: Callable[[Document], tuple[Document, Answer]]) -> None:
    """The worker's end: `open_worker` gets the first line; its function answers all others."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    questions = sys.stdin
    facts, answer = open_worker(json.loads(questions.readline()))
    _say(answers, facts)
    for line in questions:
        _say(answers, answer(json.loads(line)))


def _say(answers: Any, document: Document) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()
