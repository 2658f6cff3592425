"""Task i of a split: a pure function of (seed, split, i), drawn on the CPU, gathered on the device.

Shapes: T tasks, N ways, E examples, I inner steps, B examples per mini-batch, M images, C H W image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamlctl.core.literals import Split
from mamlctl.data.counter_rng import random_words


@dataclass(frozen=True)
class Episodes:
    """A meta-batch: sampled tasks with their data, examples ordered by class.

    A label is the position of the class in its task.
    """

    support_x_TECHW: Tensor
    support_y_TE: Tensor
    query_x_TECHW: Tensor
    query_y_TE: Tensor
    class_TN: Tensor | None = None  # which class of the split each label means; None for curves
    batches_TIB: Tensor | None = None  # support examples of every inner step; None: each step uses all
    keys_T: Tensor | None = None  # an even random number of each task, for dropout; None: no dropout

    @property
    def sets(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support examples and labels, query examples and labels."""
        return self.support_x_TECHW, self.support_y_TE, self.query_x_TECHW, self.query_y_TE

    @property
    def support_keys_T(self) -> Tensor | None:
        """The random number of each task's support set."""
        return self.keys_T

    @property
    def query_keys_T(self) -> Tensor | None:
        """The random number of each task's query set."""
        return None if self.keys_T is None else self.keys_T + 1

    def present(self) -> dict[str, Tensor]:
        """The tensors that are not None, by field."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def split(self, tasks: int) -> list[Episodes]:
        """Split into parts of `tasks` tasks; the last part may have fewer."""
        parts = {name: torch.split(tensor, tasks) for name, tensor in self.present().items()}
        return [Episodes(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]


def to_device_no_sync(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU; a copy from pageable memory would wait for the device's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Placement:
    """The device and the type of examples."""

    device: torch.device
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class StreamSettings:
    """Which tasks a stream draws, and where it puts them."""

    split: Split
    seed: int
    shots: int
    queries: int
    place: Placement
    ways: int = 1  # 1 for curves, which have no classes


class Tasks(Protocol):
    """A stream of tasks: task i is the same whenever it is drawn."""

    split: Split
    seed: int
    ways: int  # 1 for curves
    shots: int
    queries: int
    device: torch.device

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return `tasks` tasks: `first`, `first` + 1, ..."""


class MiniBatches:
    """A stream whose tasks also list the support examples of each inner step.

    Mini-batches are cut one after another from repeated shuffles of a task's examples, as in the published
    code of Reptile; a batch may span two shuffles.
    """

    def __init__(self, stream: Tasks, steps: int, size: int) -> None:
        """Add mini-batches to a stream.

        Args:
            stream: the tasks.
            steps: inner steps, each of which has its own mini-batch.
            size: support examples per mini-batch.
        """
        self.stream, self.steps, self.size = stream, steps, size
        self.split, self.seed, self.device = stream.split, stream.seed, stream.device
        self.ways, self.shots, self.queries = stream.ways, stream.shots, stream.queries

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return the stream's tasks with their mini-batches."""
        purpose, examples = f"{self.split} batches", self.ways * self.shots
        batches = [
            mini_batches(self.seed, purpose, first + task, examples, self.steps, self.size)
            for task in range(tasks)
        ]
        episodes = self.stream.episodes(first, tasks)
        return replace(episodes, batches_TIB=torch.from_numpy(np.stack(batches)).to(self.device))


class Keyed:
    """A stream whose tasks also have a random number, a function of the seed and the number of the task."""

    def __init__(self, stream: Tasks, seed: int) -> None:
        self.stream, self.key_seed = stream, seed
        self.split, self.seed, self.device = stream.split, stream.seed, stream.device
        self.ways, self.shots, self.queries = stream.ways, stream.shots, stream.queries

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return the stream's tasks with their random numbers."""
        words = [random_words(self.key_seed, "dropout", first + task, 1) for task in range(tasks)]
        keys_T = torch.from_numpy((np.concatenate(words) >> np.uint64(2)).astype(np.int64) * 2)
        return replace(self.stream.episodes(first, tasks), keys_T=keys_T)


def mini_batches(
    seed: int, purpose: str, task: int, examples: int, steps: int, size: int
) -> NDArray[np.int64]:
    """Draw the support examples of every inner step of a task, from as many shuffles as needed.

    Args:
        seed: the seed of the stream.
        purpose: a key of `counter_rng.STREAMS`.
        task: the number of the task.
        examples: how many support examples the task has.
        steps: inner steps, I.
        size: examples per inner step, B.

    Returns:
        Positions of examples in the support set, _IB.
    """
    shuffles = -(-steps * size // examples)
    keys = random_words(seed, purpose, task, shuffles * examples).reshape(shuffles, examples)
    return np.argsort(keys, axis=-1).reshape(-1)[: steps * size].reshape(steps, size)
