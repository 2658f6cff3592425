"""Replay meta-steps as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.nets.losses import OwnLoss
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.engine.training.meta_step import MetaStep


class Graph(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used here; tests replace it."""

    def replay(self) -> None:
        """Run the recorded launches on the current contents of their input tensors."""


Record = Callable[[Callable[[], MetaStepResult | None]], Graph]  # records the launches of a function


def record(work: Callable[[], MetaStepResult | None]) -> Graph:
    """Record the kernels that a function launches, without running them."""
    graph = torch.cuda.CUDAGraph()
    # With several ranks, a thread of NCCL also calls CUDA, which the default mode takes for an error.
    recording: AbstractContextManager[None] = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with recording:
        work()
    return graph


@dataclass
class _Recorded:
    """The two graphs of one kind of meta-step."""

    measure: Graph
    move: Graph
    measured: MetaStepResult  # the tensors that `measure` writes


class Captured:
    """Replaces `MetaStep.measure` and `MetaStep.apply` by graphs, with the same results.

    Meta-steps are of one kind if they launch the same kernels: the same derivative order, the same query
    losses in the meta-loss and the same measurements. The first meta-step of a kind runs eagerly, because
    compiling kernels and timing convolutions are not possible in a capture. The second one is
    recorded, later ones are replayed. Values that change from step to step (tasks, MSL weights, learning
    rate) are copied into the tensors that the graphs read.
    """

    def __init__(
        self,
        step: MetaStep,
        *,
        on_failure: Callable[[str], None] = lambda why: None,
        record: Record = record,
    ) -> None:
        """Record nothing yet.

        Args:
            step: the eager meta-step.
            on_failure: called once with the reason if a capture fails; all later meta-steps are eager.
            record: records a function as a graph.
        """
        self.step, self._on_failure, self._record = step, on_failure, record
        self._failed = False
        self._kinds: dict[tuple[object, ...], _Recorded | None] = {}  # None: seen once, not recorded yet
        self._tasks: Episodes | None = None  # inputs of the graphs
        like = step.state.example_tensor
        self._weights = like.new_zeros(step.config.inner_steps, requires_grad=False)  # input: MSL weights
        self._weights_now: tuple[float, ...] = ()  # their values

    def measure(self, episodes: Episodes, epoch: int, *, measure_all: bool) -> MetaStepResult:
        """Do the same as `MetaStep.measure`; the next call overwrites the tensors of the result."""
        weights, first_order, _ = self.step.schedule(epoch)
        kind = first_order, tuple(weight != 0 for weight in weights), measure_all
        is_first = kind not in self._kinds
        recorded = self._kinds.setdefault(kind, None)
        if self._failed or is_first or self.step.config.trains_body_only(epoch):
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
        """Do the same as `MetaStep.apply`."""
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
        if weights != self._weights_now:  # they change at most once per epoch
            self._weights.copy_(torch.tensor(weights, dtype=self._weights.dtype))
            self._weights_now = weights

    def _capture(self, weights: tuple[float, ...], first_order: bool, measure_all: bool) -> _Recorded | None:
        tasks = self._tasks
        assert tasks is not None
        # A tensor for each weight that counts, so that a replay reads its current value.
        counted: list[float | Tensor] = [
            self._weights[step] if weight else 0.0 for step, weight in enumerate(weights)
        ]
        request = MetaStepRequest(self.step.config.inner_steps, counted, first_order, measure_all)
        measured: list[MetaStepResult] = []
        try:
            measure = self._record(lambda: measured.append(self.step.measure_as(tasks, request)))
            move = self._record(lambda: self.step.move(measured[0]))
        except RuntimeError as error:  # includes torch.OutOfMemoryError
            self._failed = True
            self._kinds.clear()
            self._on_failure(str(error).partition("\n")[0])
            return None
        return _Recorded(measure, move, measured[0])


def runner_of(step: MetaStep, on_failure: Callable[[str], None] = lambda why: None) -> MetaStep | Captured:
    """Return CUDA-graph meta-steps if device, settings and algorithm allow it, else the eager ones.

    `on_failure` is called with the reason if a capture fails.
    """
    config = step.config
    allowed = config.cuda_graph is not False and algorithm_of(config).captured
    # A loop over tasks draws random numbers on the CPU, or was chosen because vmap does not work.
    allowed &= not isinstance(step.net, ModuleNet) or step.net.plan.one_pass
    # The user's loss may do what a graph cannot record, such as copies from the host.
    allowed &= not isinstance(step.net.objective.loss, OwnLoss)
    return Captured(step, on_failure=on_failure) if step.device.type == "cuda" and allowed else step
