"""Endless streams of regression tasks: number i is a curve with points, a pure function of (seed, split, i).

Shapes: T tasks, K points, E examples in a set (here its points), D = 1 input, P words per task, W words per
number or point. The words are equal on every machine, the points up to the last bits of numpy's sin.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.literals import Split
from mamlctl.data.counter_rng import STREAMS, random_words
from mamlctl.data.sets.curves import Family, Floats
from mamlctl.data.tasks.episodes import Episodes, StreamSettings, to_device_no_sync

BLOCK = 4  # words per Philox counter


class CurveStream:
    """All tasks of a family; task i does not depend on the run, the batch size or the order of calls.

    Streams that differ only in shots or queries share the curves and the first points of each set.
    """

    ways = 1  # there are no classes

    def __init__(self, family: Family, settings: StreamSettings) -> None:
        self.family, self.split, self.seed = family, settings.split, settings.seed
        self.shots, self.queries = settings.shots, settings.queries
        self.device, self._dtype = settings.place.device, settings.place.dtype

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ... without a host sync: x _TED, y _TE (unbounded numbers)."""
        x_TE, y_TE = self._draw(first, tasks)
        cut = self.shots
        parts = [x_TE[:, :cut], y_TE[:, :cut], x_TE[:, cut:], y_TE[:, cut:]]
        # A single copy to the device for all four, each of which stays contiguous.
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(self._dtype)
        flat = to_device_no_sync(flat, self.device)
        support_x, support_y, query_x, query_y = torch.split(flat, [part.size for part in parts])
        return Episodes(
            support_x_TECHW=support_x.view(tasks, self.shots, 1),
            support_y_TE=support_y.view(tasks, self.shots),
            query_x_TECHW=query_x.view(tasks, self.queries, 1),
            query_y_TE=query_y.view(tasks, self.queries),
        )

    def curve(self, task: int, x: Floats) -> Floats:
        """Return y of one task's true curve at any x (shape kept)."""
        uniform_P = _uniform(random_words(self.seed, self.split, task, self.family.words))
        return self.family.curve(self.family.numbers(uniform_P), x)

    def _draw(self, first: int, tasks: int) -> tuple[Floats, Floats]:
        """Return x_TE and y_TE, support points before query points."""
        family, width = self.family, self.family.inputs.words
        own_words, pairs = family.words, max(self.shots, self.queries)
        words = own_words + pairs * 2 * width
        uniform = _uniform(_task_words(self.seed, self.split, first, tasks, words))
        # Support and query points alternate, so that the number of one does not move the words of the other.
        pairs_TK2W = uniform[:, own_words:].reshape(tasks, pairs, 2, width)
        points_TEW = np.concatenate(
            [pairs_TK2W[:, : self.shots, 0], pairs_TK2W[:, : self.queries, 1]], axis=1
        )
        # Contiguous, since numpy may use another sine for strided arrays: tasks would depend on the batch.
        numbers_T1 = family.numbers(np.ascontiguousarray(uniform[:, :own_words].T)[..., None])
        x_TE = family.points(numbers_T1, np.ascontiguousarray(points_TEW.transpose(2, 0, 1)))
        return x_TE, family.curve(numbers_T1, x_TE)


def _uniform(raw: NDArray[np.uint64]) -> Floats:
    """The top 53 bits of each word as a number in [0, 1)."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _task_words(seed: int, split: Split, first: int, tasks: int, words: int) -> NDArray[np.uint64]:
    """`random_words` of every task -> _TP.

    One generator moves from block to block (0.07 ms for 25 tasks; one generator per task takes 0.22 ms).
    """
    key = np.array([seed, STREAMS[split]], dtype=np.uint64)
    generator = np.random.Philox(counter=np.array([0, first, 0, 0], dtype=np.uint64), key=key)
    # A block has 2**64 counters, some of which the draw has used.
    unused = 2**64 - math.ceil(words / BLOCK)
    raw_TP = np.empty((tasks, words), dtype=np.uint64)
    for row in raw_TP:
        row[:] = generator.random_raw(words)
        generator.advance(unused)
    return raw_TP
