"""Endless streams of regression tasks: number i is a curve with points, a pure function of (seed, split, i).

Shapes: T tasks, K points, E examples in a set (here its points), D = 1 input, P words per task, W words per
number or point. The words are equal on every machine, the points up to the last bits of numpy's sin.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mamlctl.data.counter_rng import random_word_rows, random_words, uniform_numbers
from mamlctl.data.sets.curves import Family, Floats
from mamlctl.data.tasks.episodes import Episodes, StreamSettings, to_device_no_sync

# Random words of a draw, which serves many calls of `episodes`: most of a draw's time is its number of calls.
DRAWN = 2**16


class CurveStream:
    """All tasks of a family; task i does not depend on the run, the batch size or the order of calls.

    Streams that differ only in shots or queries share the curves and the first points of each set.
    """

    ways = 1  # there are no classes

    def __init__(self, family: Family, settings: StreamSettings) -> None:
        self.family, self.split, self.seed = family, settings.split, settings.seed
        self.shots, self.queries = settings.shots, settings.queries
        self.device, self._dtype = settings.place.device, settings.place.dtype
        self._words = family.words + max(self.shots, self.queries) * 2 * family.inputs.words  # per task
        self._first = self._tasks = 0  # which tasks are in `_ahead`
        self._ahead: list[Tensor] = []

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ... without a host sync: x _TED, y _TE (unbounded numbers)."""
        start = first - self._first
        if start < 0 or start + tasks > self._tasks:
            self._first, self._tasks, start = first, max(tasks, DRAWN // self._words), 0
            self._ahead = self._on_device(*self._draw(first, self._tasks))
        support_x, support_y, query_x, query_y = (part[start : start + tasks] for part in self._ahead)
        return Episodes(support_x, support_y, query_x, query_y)

    def _on_device(self, x_TE: Floats, y_TE: Floats) -> list[Tensor]:
        """Return support x and y, then query x and y, in one copy to the device."""
        cut = self.shots
        parts = [x_TE[:, :cut, None], y_TE[:, :cut], x_TE[:, cut:, None], y_TE[:, cut:]]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(self._dtype)
        split = torch.split(to_device_no_sync(flat, self.device), [part.size for part in parts])
        return [tensor.view(part.shape) for tensor, part in zip(split, parts, strict=True)]

    def curve(self, task: int, x: Floats) -> Floats:
        """Return y of one task's true curve at any x (shape kept)."""
        uniform_P = uniform_numbers(random_words(self.seed, self.split, task, self.family.words))
        return self.family.curve(self.family.numbers(uniform_P), x)

    def _draw(self, first: int, tasks: int) -> tuple[Floats, Floats]:
        """Return x_TE and y_TE, support points before query points."""
        family, width = self.family, self.family.inputs.words
        own_words, pairs = family.words, max(self.shots, self.queries)
        uniform = uniform_numbers(random_word_rows(self.seed, self.split, first, tasks, self._words))
        # Support and query points alternate, so that the number of one does not move the words of the other.
        pairs_TK2W = uniform[:, own_words:].reshape(tasks, pairs, 2, width)
        points_TEW = np.concatenate(
            [pairs_TK2W[:, : self.shots, 0], pairs_TK2W[:, : self.queries, 1]], axis=1
        )
        # Contiguous, since numpy may use another sine for strided arrays: tasks would depend on the batch.
        numbers_T1 = family.numbers(np.ascontiguousarray(uniform[:, :own_words].T)[..., None])
        x_TE = family.points(numbers_T1, np.ascontiguousarray(points_TEW.transpose(2, 0, 1)))
        return x_TE, family.curve(numbers_T1, x_TE)
