"""The algorithms: one entry each, and no other place knows their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mamlctl.config import IMPROVEMENTS, Problem, TrainConfig, flag, nearest
from mamlctl.engine.adjoint import adjoint
from mamlctl.engine.outer import Measured, unrolled
from mamlctl.errors import SettingsError


@dataclass(frozen=True)
class Algorithm:
    """How an algorithm gets its meta-gradient, and the settings that make it what it is."""

    summary: str
    outer: Mapping[str, Callable[..., Measured]]  # by the setting `engine`; all give the same numbers
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what no setting may change


UNROLLED = {"adjoint": adjoint, "plain": unrolled}
ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm("Finn, Abbeel & Levine 2017 (arXiv:1703.03400), second order", UNROLLED),
    "fomaml": Algorithm("MAML in first order", UNROLLED, {"first_order": True}, fixed={"first_order": True}),
    "maml++": Algorithm(
        "Antoniou, Edwards & Storkey 2019 (arXiv:1810.09502): MAML with all six improvements",
        UNROLLED,
        dict.fromkeys(IMPROVEMENTS, True),
    ),
}


def algorithm_problems(config: TrainConfig) -> list[Problem]:
    """Settings that would make the algorithm another one than its name says."""
    fixed = ALGORITHMS[config.algo].fixed.items() if config.algo in ALGORITHMS else ()
    return [
        (
            f"{flag(name)} is {getattr(config, name)}, but --algo {config.algo} means {wanted}",
            "use another --algo",
        )
        for name, wanted in fixed
        if getattr(config, name) != wanted
    ]


def algorithm_defaults(name: str) -> Mapping[str, Any]:
    """The settings that `--algo name` implies. Raises SettingsError for an unknown name."""
    if name not in ALGORITHMS:
        hint = nearest(name, ALGORITHMS, otherwise=f"use one of {', '.join(ALGORITHMS)}")
        raise SettingsError([(f"unknown algorithm '{name}'", hint)])
    return ALGORITHMS[name].defaults
