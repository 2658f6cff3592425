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
    "dropout": 14,
    "class split": 16,
    "glyph shapes": 17,
    "glyph drawings": 18,
    "train passes": 19,
    "val passes": 20,
    "test passes": 21,
    "action noise": 22,
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


# Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), numpy's `Philox`.
ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
WORDS = 4  # per counter


def random_word_rows(seed: int, stream: str, first: int, rows: int, count: int) -> NDArray[np.uint64]:
    """Return `random_words` of the blocks `first`, `first` + 1, ..., one row each.

    All blocks at once: one generator that moves from block to block is 5 times slower (70 microseconds for 25
    blocks of 22 words against 13, in draws of 2,500 blocks; AMD EPYC, 2026-11-26).

    Args:
        seed: the seed of the run or of the evaluation.
        stream: a key of `STREAMS`.
        first: the first block.
        rows: how many blocks.
        count: words per block.
    """
    block = np.arange(first, first + rows, dtype=np.uint64)
    return _philox(np.array([[seed], [STREAMS[stream]]], np.uint64), block, count)


def random_words_of_keys(
    keys_T: NDArray[np.uint64], stream: str, number: int, count: int
) -> NDArray[np.uint64]:
    """Return the first `count` words of block `number`, one row per key: `random_words` with it as the seed.

    Args:
        keys_T: the keys, for example random numbers of tasks.
        stream: a key of `STREAMS`.
        number: the block, for example the number of an inner step.
        count: words per key.
    """
    keys = np.stack([keys_T.astype(np.uint64), np.full(len(keys_T), STREAMS[stream], np.uint64)])
    return _philox(keys, np.full(len(keys_T), number, np.uint64), count)


def _philox(keys: NDArray[np.uint64], block_R: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The words of some blocks, _RW; both words of the key are the same for all blocks, or one per block."""
    rows, counters = len(block_R), -(-count // WORDS)
    # numpy increases the counter before its first use.
    within = np.arange(1, counters + 1, dtype=np.uint64)
    words = [np.tile(within, rows), np.repeat(block_R, counters)]
    words += [np.zeros_like(words[0]), np.zeros_like(words[0])]
    spread = [np.repeat(key, counters) if len(key) == rows > 1 else key for key in keys]
    for number in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = (
            _long_product(words[place], factor) for place, factor in zip((0, 2), MULTIPLIERS, strict=True)
        )
        first, second = (
            key + np.uint64(number * step % 2**64) for key, step in zip(spread, KEY_STEPS, strict=True)
        )
        words = [high_1 ^ words[1] ^ first, low_1, high_0 ^ words[3] ^ second, low_0]
    return np.stack(words, -1).reshape(rows, -1)[:, :count]


def _long_product(words: NDArray[np.uint64], factor: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high and the low 64 bits of words * factor, from products of their 32-bit halves."""
    half, low_half = np.uint64(32), np.uint64(2**32 - 1)
    factor_high, factor_low = np.uint64(factor >> 32), np.uint64(factor % 2**32)
    high, low = words >> half, words & low_half
    middle = high * factor_low + (low * factor_low >> half)
    other = low * factor_high + (middle & low_half)
    return high * factor_high + (middle >> half) + (other >> half), words * np.uint64(factor)


def uniform_numbers(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The top 53 bits of each word as a number in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


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
