"""Random numbers by index: a pure function of (seed, stream, number), the same on every machine and numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What a stream of numbers is for; two uses of one seed must not meet.
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
    """The first `count` 64-bit words of block `number`.

    Only raw words: numpy guarantees their stream for ever, that of `Generator`'s methods it does not.
    """
    key = np.array([seed, STREAMS[stream]], dtype=np.uint64)
    # The low word of the counter counts within a block: 2**64 quadruples, so that blocks never overlap.
    counter = np.array([0, number, 0, 0], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(counter=counter, key=key).random_raw(count)
    return words


def k_smallest(keys: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Positions of the `count` smallest keys of the last axis, smallest first: a draw without repeats.

    A longer draw from the same keys starts with the shorter one.
    """
    if count < keys.shape[-1]:
        # Which positions argpartition finds is certain, since 64-bit keys do not tie; their order is not.
        positions = np.argpartition(keys, count - 1, axis=-1)[..., :count]
        order = np.argsort(np.take_along_axis(keys, positions, axis=-1), axis=-1)
        return np.take_along_axis(positions, order, axis=-1)
    return np.argsort(keys, axis=-1)


def shuffled(items: int, seed: int, stream: str) -> NDArray[np.int64]:
    """The numbers below `items` in a random order."""
    return k_smallest(random_words(seed, stream, 0, items), items)
