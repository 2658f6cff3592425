"""Alternating measurements: every learner of a case runs one meta-step, then every learner its next one.

Other load on the machine therefore slows all learners equally.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import OTHERS, Case, engine_problem, engine_settings
from benchmarks.machine import PROBE_SIZE
from benchmarks.pipes import Document, Worker, WorkerFailed

WARM_UP = 2  # meta-steps, in which memory is mapped, kernels are chosen and graphs are captured
SLOW_S = 10.0  # rounds that take longer are warmed up after one meta-step
LEAST = 3  # repeats that the median needs, however slow they are
TIMES_SLOWER = 20.0  # than float32: without bf16 instructions, one case in bf16 takes over ten minutes
CUDA_BURST = 20  # meta-steps per measurement, so that the time of one synchronisation is negligible


@dataclass(frozen=True)
class Plan:
    """The device, and how often to measure."""

    device: str = "cpu"
    repeats: int = 7
    seconds: float = 25.0  # per case; after that, no more than LEAST repeats
    official: Path | None = None

    @property
    def burst(self) -> int:
        """The number of meta-steps per measurement."""
        return 1 if self.device == "cpu" else CUDA_BURST


@dataclass
class Row:
    """The measurements of one learner in one case."""

    part: str  # "main", or the axis of a growth table
    case: Case
    learner: str
    seconds: list[float] = field(default_factory=list)  # per meta-step; one number per repeat
    idle_bytes: int = 0  # before the first meta-step
    peak_bytes: int = 0
    loss: float | None = None  # of the first meta-step; learners with the same arithmetic have the same loss
    skipped: str | None = None

    @property
    def precision(self) -> str:
        """The precision of the learner's convolutions."""
        return "float32" if self.learner in OTHERS else engine_settings(self.learner)["precision"]


class Machine:
    """A worker that measures the speed of matrix products between rounds."""

    def __init__(self, device: str) -> None:
        self._worker = Worker("benchmarks.machine", {"device": device})
        self.facts = self._worker.hear()
        self.seconds: dict[str, list[float]] = {}
        self.flops = 0
        self._slower: dict[str, float] = {}  # small products in a precision, relative to float32

    def sample(self, precision: str) -> None:
        answer = self._worker.ask({"precision": precision})
        self.seconds.setdefault(precision, []).append(answer["seconds"])
        self.flops = answer["flops"]

    def problem(self, precision: str) -> str | None:
        """Return why a precision is not worth measuring on this machine, or None."""
        if precision == "float32":
            return None
        if precision not in self._slower:
            seconds = [self._probe(name) for name in ("float32", precision)]
            self._slower[precision] = seconds[1] / seconds[0]
        slower = self._slower[precision]
        if slower < TIMES_SLOWER:
            return None
        return f"matrix products in {precision} are {slower:.0f} times slower than in float32"

    def _probe(self, precision: str) -> float:
        """Return the least time of three small products, in seconds."""
        question = {"precision": precision, "size": PROBE_SIZE}
        return min(self._worker.ask(question)["seconds"] for _ in range(3))

    def close(self) -> None:
        self._worker.close()


def measure(part: str, case: Case, learners: Sequence[str], plan: Plan, machine: Machine) -> list[Row]:
    """Measure one case; return one row per learner, in the given order."""
    rows = [Row(part, case, learner) for learner in learners]
    with ExitStack() as stack:
        running: list[tuple[Row, Worker]] = []
        for row in rows:
            if row.learner not in OTHERS:
                row.skipped = engine_problem(row.learner) or machine.problem(row.precision)
            if not row.skipped:
                running.append((row, stack.enter_context(_start(row, plan))))
        _hear_all(running)
        _warm_up(running)
        start = time.perf_counter()
        for repeat in range(plan.repeats):
            if repeat >= LEAST and time.perf_counter() - start > plan.seconds:
                break
            for precision in sorted({row.precision for row, _ in running}):
                machine.sample(precision)
            _round(running, plan.burst, lambda row, answer: row.seconds.append(answer["seconds"]))
    return rows


def _start(row: Row, plan: Plan) -> Worker:
    opening: Document = {"case": row.case.document(), "learner": row.learner, "device": plan.device}
    if row.learner == "official":
        opening["official"] = str(plan.official)
    return Worker("benchmarks.worker", opening)


def _hear_all(running: list[tuple[Row, Worker]]) -> None:
    """Wait for all workers, which start in parallel, since importing torch takes seconds."""
    for row, worker in list(running):
        try:
            row.idle_bytes = worker.hear()["idle_bytes"]
        except WorkerFailed as failure:
            row.skipped = str(failure)
            running.remove((row, worker))


def _warm_up(running: list[tuple[Row, Worker]]) -> None:
    def note(row: Row, answer: Document) -> None:
        row.loss = answer["loss"] if row.loss is None else row.loss

    for _ in range(WARM_UP):
        start = time.perf_counter()
        _round(running, 1, note)
        if time.perf_counter() - start > SLOW_S:
            return


def _round(running: list[tuple[Row, Worker]], count: int, note: Callable[[Row, Document], None]) -> None:
    """Run one measurement per learner; drop a learner that fails, for example for lack of memory."""
    for row, worker in list(running):
        try:
            answer = worker.ask({"count": count})
        except WorkerFailed as failure:
            row.skipped = str(failure)
            running.remove((row, worker))
            continue
        row.peak_bytes = answer["peak_bytes"]
        if answer["loss"] is None:
            row.skipped = "its meta-loss is not finite"
        note(row, answer)
