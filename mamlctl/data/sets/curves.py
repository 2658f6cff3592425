"""The families of curves, and the distributions ("laws") of their parameters ("numbers")."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The functions below import numpy when they are called, since help and settings only need the names.
Floats: TypeAlias = "NDArray[np.float64]"

# Part of every digest: another order of words is another set of tasks.
LAYOUT = "words: a task's numbers, then a support point and a query point in turn"


@dataclass(frozen=True)
class Uniform:
    """A uniform number between `low` and `high`, from one random word."""

    low: float
    high: float
    words: ClassVar[int] = 1

    def __call__(self, uniform: Floats) -> Floats:
        """Map uniform numbers in [0, 1), shape _W..., to numbers of this law, shape _..."""
        drawn: Floats = self.low + (self.high - self.low) * uniform[0]
        return drawn


@dataclass(frozen=True)
class Normal:
    """A normally distributed number, from two random words."""

    mean: float
    deviation: float
    words: ClassVar[int] = 2

    def __call__(self, uniform: Floats) -> Floats:
        """Map uniform numbers in [0, 1), shape _W..., to numbers of this law, shape _..."""
        import numpy as np

        # Box & Muller 1958. One word and scipy's inverse would be enough, but importing scipy takes longer.
        # log1p(-u) instead of log(u), since u may be 0 but is never 1.
        radius = np.sqrt(-2 * np.log1p(-uniform[0]))
        drawn: Floats = self.mean + self.deviation * radius * np.cos(2 * math.pi * uniform[1])
        return drawn


Law = Uniform | Normal
Numbers = Mapping[str, Floats]  # a task's parameters by name


@dataclass(frozen=True)
class Family:
    """Curves of one form: each number of a task has its law in `laws`, and its inputs x follow `inputs`."""

    name: str
    summary: str
    formula: str  # what `curve` computes, as Python; a test compares the two
    laws: Mapping[str, Law]
    curve: Callable[[Numbers, Floats], Floats]
    inputs: Law
    window: tuple[float, float]  # range of x in figures
    centre: str | None = None  # the number of a task that is added to its inputs

    @property
    def words(self) -> int:
        """How many uniform numbers every task needs, not counting its points."""
        return sum(law.words for law in self.laws.values())

    def numbers(self, uniform: Floats) -> dict[str, Floats]:
        """Return a task's numbers, made from `words` uniform ones along the first axis."""
        numbers, start = {}, 0
        for name, law in self.laws.items():
            numbers[name] = law(uniform[start : start + law.words])
            start += law.words
        return numbers

    def points(self, numbers: Numbers, uniform: Floats) -> Floats:
        """Return a task's inputs x, made from `inputs.words` uniform numbers along the first axis."""
        x = self.inputs(uniform)
        return x if self.centre is None else x + numbers[self.centre]

    @property
    def definition(self) -> str:
        """Everything that determines the tasks, in words."""
        laws = "; ".join(f"{name} ~ {law}" for name, law in self.laws.items())
        around = "" if self.centre is None else f"{self.centre} + "
        return f"y = {self.formula}; {laws}; x ~ {around}{self.inputs}; {LAYOUT}"

    @property
    def digest(self) -> str:
        """The sha256 of the definition: equal digests, seeds and splits mean equal tasks."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


def _sinusoid(n: Numbers, x: Floats) -> Floats:
    import numpy as np

    return n["amplitude"] * np.sin(x - n["phase"])


def _harmonic(n: Numbers, x: Floats) -> Floats:
    import numpy as np

    angle = n["frequency"] * x
    return n["a1"] * np.sin(angle + n["b1"]) + n["a2"] * np.sin(2 * angle + n["b2"])


FAMILIES = {
    # Finn, Abbeel & Levine 2017 (arXiv:1703.03400), section 5.1; the phase has the sign of their
    # data_generator.py.
    "sinusoid": Family(
        name="sinusoid",
        summary="sine waves with random amplitude and phase (Finn et al. 2017)",
        formula="amplitude * sin(x - phase)",
        laws={"amplitude": Uniform(0.1, 5.0), "phase": Uniform(0.0, math.pi)},
        curve=_sinusoid,
        inputs=Uniform(-5.0, 5.0),
        window=(-5.0, 5.0),
    ),
    # The lines of Finn, Xu & Levine 2018 (arXiv:1806.02817), with the ranges of torchmeta's
    # toy/sinusoid_line.py. Theirs are mixed with sinusoids; ours are not, and have no noise.
    "line": Family(
        name="line",
        summary="straight lines with random slope and intercept (Finn, Xu & Levine 2018, without noise)",
        formula="slope * x + intercept",
        laws={"slope": Uniform(-3.0, 3.0), "intercept": Uniform(-3.0, 3.0)},
        curve=lambda n, x: n["slope"] * x + n["intercept"],
        inputs=Uniform(-5.0, 5.0),
        window=(-5.0, 5.0),
    ),
    # Lacoste et al. 2018 (arXiv:1806.07528), as in torchmeta's toy/harmonic.py. Its docstring says that
    # [5, 7] is the range of the amplitudes; its code uses it for the frequency, with normal amplitudes.
    "harmonic": Family(
        name="harmonic",
        summary="sums of two sine waves, one with twice the frequency of the other (Lacoste et al. 2018)",
        formula="a1 * sin(frequency * x + b1) + a2 * sin(2 * frequency * x + b2)",
        laws={
            "centre": Uniform(-4.0, 4.0),
            "frequency": Uniform(5.0, 7.0),
            **{"b1": Uniform(0.0, 2 * math.pi), "b2": Uniform(0.0, 2 * math.pi)},
            **{"a1": Normal(0.0, 1.0), "a2": Normal(0.0, 1.0)},
        },
        curve=_harmonic,
        inputs=Normal(0.0, 1.0),
        window=(-7.0, 7.0),  # three standard deviations around any centre
        centre="centre",
    ),
}
