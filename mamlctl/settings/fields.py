"""The fields of the settings classes: their help, their limits, and the records of MAML++'s improvements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from types import MappingProxyType
from typing import Any

from mamlctl.core.literals import BatchNorm, Obstacle

SEEDS = 2**63  # exclusive limit of seeds: every generator in use accepts 63 bits
LARGEST = 1e38  # close to the largest float32
MOST_TASKS = 100_001  # per meta-step: larger values are almost certainly typos

# The panels of the help.
EPISODE = "Episode"
NETWORK = "Network"
INNER = "Inner loop"
OUTER = "Meta-optimiser"
REINFORCEMENT = "Reinforcement learning"
MAMLPP = "MAML++"
HARDWARE = "Hardware"
OUTPUT = "Output"
OWN_IMAGES = "Own images"


@dataclass(frozen=True)
class Limits:
    """The range of a number: `least` is inclusive, the others are exclusive."""

    least: float | None = None
    above: float | None = None
    below: float | None = None


def setting(
    default: Any,
    panel: str,
    text: str,
    *,
    before: Any = MISSING,
    decides: bool = True,
    common: bool = False,
    variable: bool = False,
    **limits: float,
) -> Any:
    """A dataclass field with its help and limits.

    Args:
        default: the value; None if it is derived later.
        panel: the help panel.
        text: the help, one sentence.
        before: the value that older runs and evaluations, which lack the field, effectively had; by default
            `default`.
        decides: whether results depend on the setting by more than rounding.
        common: whether people change it often, so that `--help` shows it and not only `--help-all`.
        variable: whether an environment variable can give its default, e.g. MAMLCTL_DEVICE.
        limits: the fields of `Limits`.
    """
    metadata = {
        "panel": panel,
        "help": text,
        "limits": Limits(**limits),
        "before": default if before is MISSING else before,
        "decides": decides,
        "common": common,
        "variable": variable,
    }
    return field(default=default, metadata=metadata)


# Derives a setting that is None from a TrainConfig, whose module imports this one.
Derivation = Callable[[Any], float]


@dataclass(frozen=True)
class Improvement:
    """An improvement of MAML++, declared by the field of `TrainConfig` that turns it on."""

    name: str
    help: str
    companions: Mapping[str, Derivation]  # settings that have no meaning without this improvement
    unsupported_by: tuple[Obstacle, ...]  # what makes the improvement meaningless
    paper_group: str  # improvements of one group are one improvement in the paper
    read_by_bn: BatchNorm | None  # the only --bn for which it changes an evaluation; None: every one


def improvement(
    text: str,
    *,
    companions: Mapping[str, Derivation] = MappingProxyType({}),
    unsupported_by: tuple[Obstacle, ...] = (),
    paper_group: str = "",
    read_by_bn: BatchNorm | None = None,
) -> Any:
    """The field that declares an improvement; the arguments are the fields of `Improvement`.

    Args:
        text: the help, one sentence.
        paper_group: by default the improvement is a group of its own.
    """
    record = Improvement("", text, companions, unsupported_by, paper_group, read_by_bn)
    metadata = setting(False, MAMLPP, text, common=True).metadata
    return field(default=False, metadata={**metadata, "improvement": record})
