"""Tasks that share no image, as far as a split allows."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import SettingsError
from mamlctl.data.counter_rng import k_smallest, random_words
from mamlctl.data.tasks.image_tasks import TURNS, TaskStream

BLOCKS_PER_PASS = 2**32  # blocks of random words per pass: one for its images and order, and one per task


class Pass(NamedTuple):
    """Tasks that share no image, in their final order. Shapes: P tasks in the pass, C classes."""

    class_PN: NDArray[np.int64]  # positions in the split
    block_PN: NDArray[np.int64]  # which of the class's blocks
    turns_PN: NDArray[np.int64]  # quarter turns
    image_CM: NDArray[np.int64]  # the images of every class, shuffled


class DisjointTasks(TaskStream):
    """Passes over a split; a pass has the greatest number of tasks that use every image at most once.

    The images of each class are shuffled and cut into blocks of shots + queries. Each task takes one block
    from each of the classes that have most blocks left, which gives the greatest number of tasks. Ties are
    broken at random, and the order of a task's classes and of the tasks is random, since late tasks get the
    small classes. The next pass starts with new shuffles. A turned training image is still the same image.
    """

    def _prepare(self) -> None:
        if (classes := len(self._counts)) < self.ways:
            fact = f"--ways is {self.ways}, but --disjoint has {classes} classes, not counting turned ones"
            raise SettingsError([(fact, f"use --ways {classes} or fewer, or leave out --disjoint")])
        self._block = self.shots + self.queries
        self._purpose = f"{self.split} disjoint"
        self._kept: tuple[int, Pass] = 0, self._make_pass(0)
        self.tasks_once = len(self._kept[1].class_PN)  # without reusing an image

    def words(self, tasks: int) -> str:
        """How often that many tasks use an image, in words."""
        if tasks <= self.tasks_once:
            return f"{self.tasks_once} tasks without reusing an image; {tasks} requested"
        once, most = self.tasks_once, -(-tasks // self.tasks_once)
        return f"{once} tasks use each image once; {tasks} tasks use an image up to {most} times"

    def _draw(self, first: int, tasks: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        parts = []
        size, last = self.tasks_once, first + tasks
        # Each part belongs to one pass.
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
        """Return a pass; the most recent one is cached."""
        if self._kept[0] != number:
            self._kept = number, self._make_pass(number)
        return self._kept[1]

    def _make_pass(self, number: int) -> Pass:
        counts, ways = self._counts, self.ways
        classes, most = len(counts), int(counts.max())
        left_C = counts // self._block
        tasks = _most_tasks(left_C, ways)
        words = random_words(self.seed, self._purpose, number * BLOCKS_PER_PASS, classes * most + tasks)
        keys_CM = words[: classes * most].reshape(classes, most)
        keys_CM[np.arange(most) >= counts[:, None]] = np.iinfo(np.uint64).max  # as in TaskStream
        class_PN, block_PN, turns_PN = np.zeros((3, tasks, ways), dtype=np.int64)
        for task in range(tasks):
            raw = random_words(
                self.seed, self._purpose, number * BLOCKS_PER_PASS + 1 + task, classes + 2 * ways
            )
            richest = np.lexsort((raw[:classes], -left_C))[:ways]
            chosen = richest[np.argsort(raw[classes : classes + ways])]
            left_C[chosen] -= 1
            class_PN[task], block_PN[task] = chosen, left_C[chosen]
            if self._turns:
                turns_PN[task] = (raw[classes + ways :] & np.uint64(TURNS - 1)).astype(np.int64)
        order = k_smallest(words[classes * most :], tasks)
        return Pass(class_PN[order], block_PN[order], turns_PN[order], np.argsort(keys_CM, axis=-1))


def _most_tasks(blocks_C: NDArray[np.int64], ways: int) -> int:
    """The greatest number P of tasks, each of which takes one block from each of `ways` classes.

    P tasks are possible if and only if the sum of min(blocks, P) over classes is at least P * ways.
    """
    low, high = 1, int(blocks_C.sum()) // ways
    while low < high:
        middle = (low + high + 1) // 2
        enough = np.minimum(blocks_C, middle).sum() >= middle * ways
        low, high = (middle, high) if enough else (low, middle - 1)
    return low
