"""Tasks that use no image twice, as far as a split allows."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import SettingsError
from mamlctl.data.counter_rng import k_smallest, random_words
from mamlctl.data.tasks.image_tasks import TURNS, TaskStream

A_PASS = 2**32  # blocks of random words that a pass may take: its images and order one, each task another


class Pass(NamedTuple):
    """Tasks that share no image, in the order in which they are asked for. Shapes: P tasks of a pass."""

    class_PN: NDArray[np.int64]  # position in the split
    block_PN: NDArray[np.int64]  # which of the class's blocks
    turns_PN: NDArray[np.int64]
    image_CM: NDArray[np.int64]  # every class's images, shuffled


class DisjointTasks(TaskStream):
    """Passes over a split, each with as many tasks as use every image at most once.

    A class's images are shuffled and cut into blocks of shots + queries. Each task takes a block of those
    classes that have most left, which gives the greatest number of tasks; ties are drawn, and so are the
    order of a task's classes and of the tasks, since late ones have the small classes. The next pass begins
    with new shuffles. A training image counts as one however it is turned.
    """

    def _prepare(self) -> None:
        if (classes := len(self._counts)) < self.ways:
            fact = f"--disjoint counts turned images as one: {classes} classes, but --ways is {self.ways}"
            raise SettingsError([(fact, f"use --ways {classes} or fewer, or leave out --disjoint")])
        self._block = self.shots + self.queries
        self._purpose = f"{self.split} disjoint"
        self._kept: tuple[int, Pass] = 0, self._make_pass(0)
        self.tasks_once = len(self._kept[1].class_PN)  # without reusing an image

    def words(self, tasks: int) -> str:
        """How often so many tasks use an image."""
        if tasks <= self.tasks_once:
            return f"{self.tasks_once} tasks without reusing an image; {tasks} asked"
        once, most = self.tasks_once, -(-tasks // self.tasks_once)
        return f"{once} tasks use each image once; in {tasks} tasks an image is used up to {most} times"

    def _draw(self, first: int, tasks: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        parts = []
        size, last = self.tasks_once, first + tasks
        # Parts that each lie in one pass.
        cuts = [first, *range((first // size + 1) * size, last, size), last]
        for begin, end in itertools.pairwise(cuts):
            drawn, start = self._pass(begin // size), begin % size
            at = slice(start, start + end - begin)
            class_TN, block_TN = drawn.class_PN[at], drawn.block_PN[at]
            place_TNE = block_TN[..., None] * self._block + np.arange(self._block)
            parts.append((class_TN, drawn.image_CM[class_TN[..., None], place_TNE], drawn.turns_PN[at]))
        class_TN, example_TNE, turns_TN = (np.concatenate(part) for part in zip(*parts, strict=True))
        return class_TN, example_TNE, turns_TN

    def _pass(self, number: int) -> Pass:
        """A pass; the last one asked for is kept."""
        if self._kept[0] != number:
            self._kept = number, self._make_pass(number)
        return self._kept[1]

    def _make_pass(self, number: int) -> Pass:
        counts, ways = self._counts, self.ways
        classes, most = len(counts), int(counts.max())
        left_C = counts // self._block
        tasks = _most_tasks(left_C, ways)
        words = random_words(self.seed, self._purpose, number * A_PASS, classes * most + tasks)
        keys_CM = words[: classes * most].reshape(classes, most)
        keys_CM[np.arange(most) >= counts[:, None]] = np.iinfo(np.uint64).max  # as in TaskStream
        class_PN, block_PN, turns_PN = np.zeros((3, tasks, ways), dtype=np.int64)
        for task in range(tasks):
            raw = random_words(self.seed, self._purpose, number * A_PASS + 1 + task, classes + 2 * ways)
            richest = np.lexsort((raw[:classes], -left_C))[:ways]
            chosen = richest[np.argsort(raw[classes : classes + ways])]
            left_C[chosen] -= 1
            class_PN[task], block_PN[task] = chosen, left_C[chosen]
            if self._turns:
                turns_PN[task] = (raw[classes + ways :] & np.uint64(TURNS - 1)).astype(np.int64)
        order = k_smallest(words[classes * most :], tasks)
        return Pass(class_PN[order], block_PN[order], turns_PN[order], np.argsort(keys_CM, axis=-1))


def _most_tasks(blocks_C: NDArray[np.int64], ways: int) -> int:
    """The greatest number P of tasks that each take a block of `ways` classes.

    P can be reached if, and only if, the sum of min(blocks, P) is at least P ways.
    """
    low, high = 1, int(blocks_C.sum()) // ways
    while low < high:
        middle = (low + high + 1) // 2
        enough = np.minimum(blocks_C, middle).sum() >= middle * ways
        low, high = (middle, high) if enough else (low, middle - 1)
    return low
