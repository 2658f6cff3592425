"""A worker process that reads questions and writes answers, one line of JSON each.

Each learner has its own process, so that its peak memory can be measured.
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
    """A worker ended without an answer; the message is the last line of its stderr."""


class Worker:
    """The parent's side of the pipes."""

    def __init__(self, module: str, opening: Document) -> None:
        """Start `python -m module` and send it `opening`; the first `hear` returns the answer."""
        # OMP_WAIT_POLICY is not set: a waiting worker uses only 0.5 % of a core, and with PASSIVE a meta-step
        # takes 0.88 s instead of 0.68 s (omniglot-5w1s, medians of 9 alternating runs, 2 cores).
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._send(opening)

    def ask(self, question: Document) -> Document:
        """Send a question and return its answer.

        Raises:
            WorkerFailed: the worker has ended.
        """
        self._send(question)
        return self.hear()

    def _send(self, question: Document) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # `hear` reports that the worker has ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def hear(self) -> Document:
        """Return the next answer.

        Raises:
            WorkerFailed: the worker has ended.
        """
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
        # A worker that the kernel killed, usually for memory, has printed nothing.
        return f"killed by signal {-status}" if status < 0 else (lines or [f"exit status {status}"])[-1]

    def close(self) -> None:
        """Close stdin, at which the worker ends, and wait for it."""
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
    """Run the worker's side: `open_worker` gets the first question, and returns a function for the others."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout, which must not mix with answers
    questions = sys.stdin
    facts, answer = open_worker(json.loads(questions.readline()))
    _send(answers, facts)
    for line in questions:
        _send(answers, answer(json.loads(line)))


def _send(answers: Any, document: Document) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()
