"""What a field of a settings class is made with: help, limits, and what each improvement of MAML++ is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from types import MappingProxyType
from typing import Any

from mamlctl.core.literals import BatchNorm, Obstacle

SEEDS = 2**63  # seeds are below it: half of a 64-bit word, which every generator here takes
LARGEST = 1e38  # float32 holds no larger number
MOST_TASKS = 100_001  # per meta-step: larger values are almost certainly typos

# The panels of the help.
EPISODE = "Episode"
NETWORK = "Network"
INNER = "Inner loop"
OUTER = "Meta-optimiser"
MAMLPP = "MAML++"
HARDWARE = "Hardware"
OUTPUT = "Output"
OWN_IMAGES = "Own images"


@dataclass(frozen=True)
class Limits:
    """What a number must keep."""

    least: float | None = None
    above: float | None = None
    below: float | None = None


def setting(
    default: Any, panel: str, text: str, *, before: Any = MISSING, decides: bool = True, **limits: float
) -> Any:
    """A field with its help and limits.

    Args:
        before: its value in runs and evaluations from before it, if not the default.
        decides: whether results depend on it, other than by rounding.
        limits: the fields of Limits.
    """
    old = default if before is MISSING else before
    metadata = {"panel": panel, "help": text, "limits": Limits(**limits), "before": old, "decides": decides}
    return field(default=default, metadata=metadata)


# What a setting is where it is left open, from the TrainConfig, whose module stands above this one.
Derivation = Callable[[Any], float]


@dataclass(frozen=True)
class Improvement:
    """An improvement of MAML++, as the field of `TrainConfig` that turns it on describes it."""

    name: str
    help: str
    companions: Mapping[str, Derivation]  # settings that only this improvement gives a meaning to
    unsupported_by: tuple[Obstacle, ...]  # where it has no meaning
    paper_group: str  # improvements of one group are one improvement in the paper
    read_by_bn: BatchNorm | None  # the only --bn with which it changes a test; None: it always does


def improvement(
    text: str,
    *,
    companions: Mapping[str, Derivation] = MappingProxyType({}),
    unsupported_by: tuple[Obstacle, ...] = (),
    paper_group: str = "",
    read_by_bn: BatchNorm | None = None,
) -> Any:
    """The field of an improvement: the one place where it is declared; without a group it is its own."""
    record = Improvement("", text, companions, unsupported_by, paper_group, read_by_bn)
    return field(default=False, metadata={**setting(False, MAMLPP, text).metadata, "improvement": record})
