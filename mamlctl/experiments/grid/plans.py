"""Plans of an ablation: which rows its table has, and what sets each of them apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS, TrainConfig

PLANS = ("one-on", "one-off", "cumulative", "full")

# The paper tells statistics and weights of batch norm as one improvement (section 4); apart, only the weights
# matter where queries are normalised by their own statistics.
JOINED = ("bnrs", "bnwb")

ALONE = ((), ("msl",), ("da",), JOINED, *zip(JOINED), ("lslr",), ("ca",))

ORDER = "msl-da-bnrs+bnwb-lslr-ca"  # the paper's, section 4

PLUS_PLUS = "maml++"

# Rows of one table are judged on the same tasks, so nothing that decides those can vary.
OF_TASKS = (
    *("dataset", "ways", "shots", "queries", "split_scheme", "split_fractions", "split_seed", "eval_seed"),
    *("image_size", "channels", "resize", "strict"),
)


@dataclass(frozen=True)
class PlannedRow:
    """A row to be: its name, the algorithm it begins with, and the settings laid over everything else."""

    label: str
    algo: str | None  # None: as asked for
    values: Mapping[str, Any]

    @property
    def of_improvements(self) -> bool:
        """Whether the row says of every improvement if it is on."""
        return set(IMPROVEMENTS) <= self.values.keys()

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^\w.+=,-]", "_", self.label.replace(" ", ""))


def improvement_rows(plan: str, algo: str, order: str = ORDER) -> list[PlannedRow]:
    """The rows of a plan of improvements, the baseline first. Raises SettingsError for a wrong `order`.

    `algo`: what improvements are laid on; maml++ counts as maml, since it is maml with all of them.
    """
    base = "maml" if algo == PLUS_PLUS else algo
    if plan == "one-on":
        return [_with(base, on) for on in [*ALONE, IMPROVEMENTS]]
    if plan == "one-off":
        return [_without(base, off) for off in ALONE]
    if plan == "cumulative":
        steps = _ordered(order)
        return [_with(base, [*itertools.chain(*steps[:count])]) for count in range(len(steps) + 1)]
    subsets = itertools.product((False, True), repeat=len(IMPROVEMENTS))
    chosen = [tuple(itertools.compress(IMPROVEMENTS, subset)) for subset in subsets]
    return [_with(base, on) for on in sorted(chosen, key=len)]


def grid_rows(pairs: Sequence[str]) -> list[PlannedRow]:
    """A row for every combination of `key=v1,v2` pairs, the first value of each first.

    Raises SettingsError for a pair that is none, an unknown setting, or one that decides the test tasks.
    """
    axes, problems = [], []
    for pair in pairs:
        key, equals, values = pair.partition("=")
        words = values.split(",")
        if not equals or not all(words):
            problems.append((f"--grid {pair} has no values", "write --grid inner_lr=0.1,0.4"))
        elif key not in FIELDS:
            hint = nearest(key, FIELDS, otherwise="mamlctl train --print-config shows all settings")
            problems.append((f"unknown setting '{key}' in --grid", hint))
        elif key == "seed":
            problems.append(("--grid cannot vary seed, which is no row of its own", "use --seeds"))
        elif key in OF_TASKS:
            fact = f"--grid cannot vary {key}: rows of one table are tested on the same tasks"
            problems.append((fact, "make a table for each"))
        else:
            axes.append([(key, word) for word in words])
    if repeated := sorted({axis[0][0] for axis in axes if [a[0][0] for a in axes].count(axis[0][0]) > 1}):
        problems.append((f"--grid names {', '.join(repeated)} twice", "give all values at once"))
    if problems:
        raise SettingsError(problems)
    return [_of_grid(choice) for choice in itertools.product(*axes)]


def _of_grid(choice: Sequence[tuple[str, str]]) -> PlannedRow:
    values = {key: _value(key, word) for key, word in choice}
    algo = values.pop("algo", None)
    label = ", ".join(word if key == "algo" else f"{key}={word}" for key, word in choice)
    return PlannedRow(label, None if algo is None else str(algo), values)


def _value(key: str, word: str) -> Any:
    """What YAML makes of the word, as --set does. Raises SettingsError if it makes nothing of it."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={word}"]))[key]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        raise SettingsError([(f"--grid {key}={word} cannot be read", "write key=value,value")]) from error


def algorithm_rows(names: str) -> list[PlannedRow]:
    """A row for every algorithm of a list such as "maml,fomaml". Raises SettingsError for a repeated one."""
    algos = [name.strip() for name in names.split(",") if name.strip()]
    if len(set(algos)) < len(algos) or not algos:
        raise SettingsError([(f"--algos is '{names}'", "name each algorithm once: --algos maml,maml++")])
    return [PlannedRow(algo, algo, {}) for algo in algos]


def _with(base: str, on: Iterable[str]) -> PlannedRow:
    """The base with these improvements."""
    values = {name: name in on for name in IMPROVEMENTS}
    if base == "maml" and all(values.values()):
        return PlannedRow(PLUS_PLUS, PLUS_PLUS, values)
    return PlannedRow(" + ".join([base, *(name for name in IMPROVEMENTS if values[name])]), base, values)


def _without(base: str, off: Sequence[str]) -> PlannedRow:
    """The base with all improvements but these."""
    algo, name = (PLUS_PLUS, PLUS_PLUS) if base == "maml" else (base, f"{base} with all")
    values = {improvement: improvement not in off for improvement in IMPROVEMENTS}
    return PlannedRow(" - ".join([name, *off]), algo, values)


def _ordered(order: str) -> list[list[str]]:
    """ "msl-bnrs+bnwb" -> [[msl], [bnrs, bnwb]]. Raises SettingsError unless each is named once at most."""
    steps = [step.split("+") for step in order.split("-")]
    named = [*itertools.chain(*steps)]
    if wrong := [name for name in named if name not in IMPROVEMENTS]:
        hint = nearest(wrong[0], IMPROVEMENTS, otherwise=f"write it like {ORDER}")
        raise SettingsError([(f"--order names '{wrong[0]}', which is no improvement", hint)])
    if len(set(named)) < len(named):
        raise SettingsError([(f"--order {order} names an improvement twice", f"write it like {ORDER}")])
    return steps


def as_maml(config: TrainConfig) -> TrainConfig:
    """maml++ is maml with its flags: where those are looked at, the name says nothing more."""
    return replace(config, algo="maml") if config.algo == PLUS_PLUS else config


def label_of(config: TrainConfig) -> str:
    """A run's algorithm with what it has, or of MAML++ lacks, as plans name rows."""
    if config.algo == PLUS_PLUS:
        return " - ".join([PLUS_PLUS, *(name for name in IMPROVEMENTS if not getattr(config, name))])
    return " + ".join([config.algo, *config.improvements])
