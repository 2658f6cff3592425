"""Random numbers by index: a pure function of (seed, stream, number), equal for every machine and numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What each stream of numbers is for, so that two uses of one seed never share numbers.
STREAMS = {
    "train": 0,
    "val": 1,
    "test": 2,
    "train batches": 3,
    "val batches": 4,
    "test batches": 5,
    "train augment": 6,
    "own batches": 7,
    "train disjoint": 8,
    "val disjoint": 9,
    "test disjoint": 10,
    "train labels": 11,
    "val labels": 12,
    "test labels": 13,
    "class split": 16,
    "glyph shapes": 17,
    "glyph drawings": 18,
}


def random_words(seed: int, stream: str, number: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` 64-bit words of block `number`.

    Only raw words are used: numpy guarantees that their stream never changes, but not that of the methods
    of `Generator`.

    Args:
        seed: the seed of the run or of the evaluation.
        stream: a key of `STREAMS`.
        number: the block, for example the number of a task.
        count: how many words; a longer draw starts with the shorter one.
    """
    key = np.array([seed, STREAMS[stream]], dtype=np.uint64)
    # The low word of the counter counts within a block of 2**64 quadruples, so blocks never overlap.
    counter = np.array([0, number, 0, 0], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(counter=counter, key=key).random_raw(count)
    return words


def k_smallest(keys: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Return the positions of the `count` smallest keys along the last axis: a draw without repeats.

    The smallest comes first, so a longer draw from the same keys starts with the shorter one.
    """
    if count < keys.shape[-1]:
        # 64-bit keys do not tie, so argpartition always finds the same positions, but in any order.
        positions = np.argpartition(keys, count - 1, axis=-1)[..., :count]
        order = np.argsort(np.take_along_axis(keys, positions, axis=-1), axis=-1)
        return np.take_along_axis(positions, order, axis=-1)
    return np.argsort(keys, axis=-1)


def shuffled(items: int, seed: int, stream: str) -> NDArray[np.int64]:
    """Return the numbers 0, 1, ..., `items` - 1 in a random order.

    Args:
        items: how many numbers.
        seed: the seed of the run or of the evaluation.
        stream: a key of `STREAMS`.
    """
    return k_smallest(random_words(seed, stream, 0, items), items)
