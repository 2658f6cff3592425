"""Regression tasks without end: number i is a curve with points on it, a pure function of (seed, split, i).

Shapes: T tasks, K points, E examples in a set (here its points), D = 1 input, P words of a task, W words of
one number or point. The words are the same on every machine, the points to the last bits of numpy's sin.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamlctl.data.draws import STREAMS, raw_bits
from mamlctl.data.episodes import Episodes

Floats = NDArray[np.float64]
BLOCK = 4  # words of one Philox counter
# Part of every digest: another order of words is another set of tasks.
LAYOUT = "words: a task's numbers, then a support point and a query point in turn"


@dataclass(frozen=True)
class Uniform:
    """A number between `low` and `high`, of one word."""

    low: float
    high: float
    words: ClassVar[int] = 1

    def __call__(self, uniform: Floats) -> Floats:
        """Uniform numbers below 1, W leading, as numbers of this law."""
        drawn: Floats = self.low + (self.high - self.low) * uniform[0]
        return drawn


@dataclass(frozen=True)
class Normal:
    """A number of normal distribution, of two words."""

    mean: float
    deviation: float
    words: ClassVar[int] = 2

    def __call__(self, uniform: Floats) -> Floats:
        """Uniform numbers below 1, W leading, as numbers of this law."""
        # Box & Muller 1958: one word and scipy's inverse would do, but its import is slower than all of this.
        # log1p(-u), not log(u): u may be 0 but is never 1.
        radius = np.sqrt(-2 * np.log1p(-uniform[0]))
        drawn: Floats = self.mean + self.deviation * radius * np.cos(2 * math.pi * uniform[1])
        return drawn


Law = Uniform | Normal
Numbers = Mapping[str, Floats]  # of a task, by name


@dataclass(frozen=True)
class Family:
    """Curves of one form: a task's `numbers` are drawn each by its law, its points x by `inputs`."""

    name: str
    summary: str
    formula: str  # what `curve` computes, as Python; the tests hold the two together
    laws: Mapping[str, Law]
    curve: Callable[[Numbers, Floats], Floats]
    inputs: Law
    window: tuple[float, float]  # of x, for pictures
    centre: str | None = None  # the task's number that its inputs lie around

    @property
    def words(self) -> int:
        """How many uniform numbers a task takes, besides its points."""
        return sum(law.words for law in self.laws.values())

    def numbers(self, uniform: Floats) -> dict[str, Floats]:
        """A task's numbers from `words` uniform ones, which lead."""
        numbers, start = {}, 0
        for name, law in self.laws.items():
            numbers[name] = law(uniform[start : start + law.words])
            start += law.words
        return numbers

    def points(self, numbers: Numbers, uniform: Floats) -> Floats:
        """Inputs x of a task from `inputs.words` uniform numbers each, which lead."""
        x = self.inputs(uniform)
        return x if self.centre is None else x + numbers[self.centre]

    @property
    def definition(self) -> str:
        """All that decides which tasks there are, in words."""
        laws = "; ".join(f"{name} ~ {law}" for name, law in self.laws.items())
        around = "" if self.centre is None else f"{self.centre} + "
        return f"y = {self.formula}; {laws}; x ~ {around}{self.inputs}; {LAYOUT}"

    @property
    def digest(self) -> str:
        """sha256 of the definition: equal digests, seeds and splits mean equal tasks."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


def _sinusoid(n: Numbers, x: Floats) -> Floats:
    return n["amplitude"] * np.sin(x - n["phase"])


def _line(n: Numbers, x: Floats) -> Floats:
    return n["slope"] * x + n["intercept"]


def _harmonic(n: Numbers, x: Floats) -> Floats:
    angle = n["frequency"] * x
    return n["a1"] * np.sin(angle + n["b1"]) + n["a2"] * np.sin(2 * angle + n["b2"])


FAMILIES = {
    # Finn, Abbeel & Levine 2017 (arXiv:1703.03400), section 5.1; the sign of the phase as in their
    # data_generator.py.
    "sinusoid": Family(
        name="sinusoid",
        summary="sine waves of any height and phase (Finn et al. 2017)",
        formula="amplitude * sin(x - phase)",
        laws={"amplitude": Uniform(0.1, 5.0), "phase": Uniform(0.0, math.pi)},
        curve=_sinusoid,
        inputs=Uniform(-5.0, 5.0),
        window=(-5.0, 5.0),
    ),
    # The lines of Finn, Xu & Levine 2018 (arXiv:1806.02817), ranges as in torchmeta's toy/sinusoid_line.py;
    # theirs are mixed with sinusoids, ours are alone and without noise.
    "line": Family(
        name="line",
        summary="straight lines of any slope and intercept (Finn, Xu & Levine 2018, without noise)",
        formula="slope * x + intercept",
        laws={"slope": Uniform(-3.0, 3.0), "intercept": Uniform(-3.0, 3.0)},
        curve=_line,
        inputs=Uniform(-5.0, 5.0),
        window=(-5.0, 5.0),
    ),
    # Lacoste et al. 2018 (arXiv:1806.07528) as torchmeta's toy/harmonic.py has it. Its docstring calls
    # [5, 7] the range of the amplitudes; its code makes that the frequency's and the amplitudes normal.
    "harmonic": Family(
        name="harmonic",
        summary="sums of two sine waves, one of twice the other's frequency (Lacoste et al. 2018)",
        formula="a1 * sin(frequency * x + b1) + a2 * sin(2 * frequency * x + b2)",
        laws={
            "centre": Uniform(-4.0, 4.0),
            "frequency": Uniform(5.0, 7.0),
            **{"b1": Uniform(0.0, 2 * math.pi), "b2": Uniform(0.0, 2 * math.pi)},
            **{"a1": Normal(0.0, 1.0), "a2": Normal(0.0, 1.0)},
        },
        curve=_harmonic,
        inputs=Normal(0.0, 1.0),
        window=(-7.0, 7.0),  # three deviations around any centre
        centre="centre",
    ),
}


class CurveStream:
    """All tasks of a family: number i is the same in every run, batch size and order of asking.

    Streams that differ in shots or queries share the curves and, of each set, the first points.
    """

    ways = 1  # there are no classes

    def __init__(
        self,
        *,
        family: Family,
        split: str,
        seed: int,
        shots: int,
        queries: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.family, self.split, self.seed = family, split, seed
        self.shots, self.queries = shots, queries
        self.device, self._dtype = device, dtype

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Tasks `first`, `first` + 1, ..., without a host sync: x _TED, y a number of any size _TE."""
        x_TE, y_TE = self._draw(first, tasks)
        cut = self.shots
        parts = [x_TE[:, :cut], y_TE[:, :cut], x_TE[:, cut:], y_TE[:, cut:]]
        # One copy to the device for all four, each without gaps.
        flat = self._to_device_no_sync(np.concatenate([part.ravel() for part in parts]))
        support_x, support_y, query_x, query_y = torch.split(flat, [part.size for part in parts])
        return Episodes(
            support_x_TECHW=support_x.view(tasks, self.shots, 1),
            support_y_TE=support_y.view(tasks, self.shots),
            query_x_TECHW=query_x.view(tasks, self.queries, 1),
            query_y_TE=query_y.view(tasks, self.queries),
        )

    def curve(self, task: int, x: Floats) -> Floats:
        """The truth of one task at any x."""
        uniform_P = _uniform(raw_bits(self.seed, self.split, task, self.family.words))
        return self.family.curve(self.family.numbers(uniform_P), x)

    def _draw(self, first: int, tasks: int) -> tuple[Floats, Floats]:
        """-> x_TE, y_TE, shots before queries."""
        family, width = self.family, self.family.inputs.words
        own_words, pairs = family.words, max(self.shots, self.queries)
        words = own_words + pairs * 2 * width
        uniform = _uniform(_task_words(self.seed, self.split, first, tasks, words))
        # Support and query points take turns, so that neither's number moves the other's words.
        pairs_TK2W = uniform[:, own_words:].reshape(tasks, pairs, 2, width)
        points_TEW = np.concatenate(
            [pairs_TK2W[:, : self.shots, 0], pairs_TK2W[:, : self.queries, 1]], axis=1
        )
        # Without gaps, since numpy may take another sine for strided arrays: tasks would depend on the batch.
        numbers_T1 = family.numbers(np.ascontiguousarray(uniform[:, :own_words].T)[..., None])
        x_TE = family.points(numbers_T1, np.ascontiguousarray(points_TEW.transpose(2, 0, 1)))
        return x_TE, family.curve(numbers_T1, x_TE)

    def _to_device_no_sync(self, array: Floats) -> Tensor:
        tensor = torch.from_numpy(array).to(self._dtype)
        # A copy from pageable memory would wait for the device's earlier work.
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _uniform(raw: NDArray[np.uint64]) -> Floats:
    """The top 53 bits as a number from 0 to below 1."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _task_words(seed: int, split: str, first: int, tasks: int, words: int) -> NDArray[np.uint64]:
    """`raw_bits` of every task: one generator steps from block to block (0.07 ms for 25 tasks, not 0.22)."""
    key = np.array([seed, STREAMS[split]], dtype=np.uint64)
    generator = np.random.Philox(counter=np.array([0, first, 0, 0], dtype=np.uint64), key=key)
    # A block is 2**64 counters; drawing has passed some of them.
    rest = 2**64 - math.ceil(words / BLOCK)
    raw_TP = np.empty((tasks, words), dtype=np.uint64)
    for row in raw_TP:
        row[:] = generator.random_raw(words)
        generator.advance(rest)
    return raw_TP
