"""Meta-steps replayed as CUDA graphs: one launch where there were thousands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.training.meta_step import MetaStep


class Graph(Protocol):
    """What was recorded once and can be run again: `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Run it on what its inputs hold now."""


Record = Callable[[Callable[[], MetaStepResult | None]], Graph]  # run a function once, recording it


def record(work: Callable[[], MetaStepResult | None]) -> Graph:
    """Record what a function launches on the device, without running it."""
    graph = torch.cuda.CUDAGraph()
    recording: AbstractContextManager[None] = torch.cuda.graph(graph)
    with recording:
        work()
    return graph


@dataclass
class _Recorded:
    """A kind of meta-step: its two graphs, and where the first leaves what it measured."""

    measure: Graph
    move: Graph
    measured: MetaStepResult


class Captured:
    """`MetaStep`'s measuring and moving, with the same signatures and numbers.

    Kinds of meta-step differ in what they launch: derivative order, which query losses count, what is
    measured. The first of a kind runs eagerly, and so warms up all that a capture must not meet for the
    first time; the second is recorded; later ones replay. What changes from step to step (tasks, MSL weights,
    learning rate) is copied into the tensors that the graphs read.
    """

    def __init__(
        self,
        step: MetaStep,
        *,
        on_failure: Callable[[str], None] = lambda why: None,
        record: Record = record,
    ) -> None:
        self.step, self._on_failure, self._record = step, on_failure, record
        self._failed = False
        self._kinds: dict[tuple[object, ...], _Recorded | None] = {}
        self._tasks: Episodes | None = None  # what the graphs read
        like = step.state.example_tensor
        self._weights = like.new_zeros(step.config.inner_steps, requires_grad=False)
        self._weights_now: tuple[float, ...] = ()

    def measure(self, episodes: Episodes, epoch: int, *, measure_all: bool) -> MetaStepResult:
        """As `MetaStep.measure`; the next call overwrites what this returns."""
        weights, first_order, _ = self.step.schedule(epoch)
        kind = first_order, tuple(weight != 0 for weight in weights), measure_all
        is_first = kind not in self._kinds
        recorded = self._kinds.setdefault(kind, None)
        if self._failed or is_first:
            return self.step.measure(episodes, epoch, measure_all=measure_all)
        self._put(episodes, weights)
        if recorded is None:
            recorded = self._capture(weights, first_order, measure_all)
            if recorded is None:
                return self.step.measure(episodes, epoch, measure_all=measure_all)
            self._kinds[kind] = recorded
        recorded.measure.replay()
        return recorded.measured

    def apply(self, measured: MetaStepResult, epoch: int, done: float = 0.0) -> None:
        """As `MetaStep.apply`."""
        for recorded in self._kinds.values():
            if recorded is not None and recorded.measured is measured:
                self.step.set_meta_lr(epoch, done)
                recorded.move.replay()
                return
        self.step.apply(measured, epoch, done)

    def _put(self, episodes: Episodes, weights: tuple[float, ...]) -> None:
        if self._tasks is None:
            self._tasks = Episodes(**{name: tensor.clone() for name, tensor in episodes.present().items()})
        for name, tensor in episodes.present().items():
            self._tasks.present()[name].copy_(tensor)
        if weights != self._weights_now:  # once an epoch
            self._weights.copy_(torch.tensor(weights, dtype=self._weights.dtype))
            self._weights_now = weights

    def _capture(self, weights: tuple[float, ...], first_order: bool, measure_all: bool) -> _Recorded | None:
        tasks = self._tasks
        assert tasks is not None
        counted: list[float | Tensor] = [
            self._weights[step] if weight else 0.0 for step, weight in enumerate(weights)
        ]
        request = MetaStepRequest(self.step.config.inner_steps, counted, first_order, measure_all)
        measured: list[MetaStepResult] = []
        try:
            measure = self._record(lambda: measured.append(self.step.measure_as(tasks, request)))
            move = self._record(lambda: self.step.move(measured[0]))
        except RuntimeError as error:  # running out of memory too
            self._failed = True
            self._kinds.clear()
            self._on_failure(str(error).partition("\n")[0])
            return None
        return _Recorded(measure, move, measured[0])


def runner_of(step: MetaStep, on_failure: Callable[[str], None] = lambda why: None) -> MetaStep | Captured:
    """Meta-steps replayed as CUDA graphs where device, settings and algorithm allow it, else as they are."""
    config = step.config
    allowed = config.cuda_graph is not False and ALGORITHMS[config.algo].captured
    return Captured(step, on_failure=on_failure) if step.device.type == "cuda" and allowed else step
