"""Plans of an ablation: the rows of its table, and the settings that only each of them has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.settings.presets import yaml_errors
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS, TrainConfig

PLANS = ("one-on", "one-off", "cumulative", "full")

# The improvements in the paper's order, grouped as the paper counts them.
GROUPS: tuple[tuple[str, ...], ...] = tuple(
    tuple(group) for _, group in itertools.groupby(IMPROVEMENTS, lambda name: IMPROVEMENTS[name].paper_group)
)

# No improvement, and each one alone: first a whole group, then its members.
ALONE: tuple[tuple[str, ...], ...] = (
    (),
    *itertools.chain.from_iterable(
        (group, *((name,) for name in group)) if len(group) > 1 else (group,) for group in GROUPS
    ),
)

# The default of --order.
ORDER = "-".join("+".join(group) for group in GROUPS)

# The rows of a table have the same test tasks, so the settings that decide the tasks cannot vary.
OF_TASKS = (
    "dataset",
    "ways",
    "shots",
    "queries",
    "split_scheme",
    "split_fractions",
    "classes",
    "split_seed",
    "eval_seed",
    "image_size",
    "channels",
    "resize",
    "strict",
    "inputs",
    "targets",
)


@dataclass(frozen=True)
class PlannedRow:
    """A row of a plan: its name, its algorithm, and its settings, which override all others."""

    base: str  # the name without improvements
    algo: str | None  # None for that of the command line
    values: Mapping[str, Any]
    added: tuple[str, ...] = ()  # improvements that the base lacks
    removed: tuple[str, ...] = ()  # improvements that the base has

    @property
    def label(self) -> str:
        """The base with its improvements, e.g. "maml + msl"."""
        return improved_label(self.base, self.added, self.removed)

    @property
    def of_improvements(self) -> bool:
        """Whether the row turns every improvement on or off."""
        return IMPROVEMENTS.keys() <= self.values.keys()

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^\w.+=,-]", "_", self.label.replace(" ", ""))


def improvement_rows(plan: str, algo: str, order: str = ORDER) -> list[PlannedRow]:
    """The rows of a plan of improvements, the baseline first.

    Args:
        plan: one of PLANS.
        algo: the algorithm to improve; maml++ counts as maml, because it is maml with all improvements.
        order: for the plan "cumulative": improvements, or groups of them joined by "+", separated by "-".

    Raises:
        SettingsError: `order` names an unknown improvement, or one improvement twice.
    """
    base = _without_improvements(algo)
    if plan == "one-on":
        return [_improvement_row(base, on) for on in [*ALONE, tuple(IMPROVEMENTS)]]
    if plan == "one-off":
        return [_improvement_row(base, IMPROVEMENTS.keys() - off, from_all=True) for off in ALONE]
    if plan == "cumulative":
        steps = _ordered(order)
        return [_improvement_row(base, [*itertools.chain(*steps[:count])]) for count in range(len(steps) + 1)]
    switches = itertools.product((False, True), repeat=len(IMPROVEMENTS))
    subsets = [tuple(itertools.compress(IMPROVEMENTS, switch)) for switch in switches]
    return [_improvement_row(base, on) for on in sorted(subsets, key=len)]


def grid_rows(pairs: Sequence[str]) -> list[PlannedRow]:
    """A row for every combination of values in `key=v1,v2` pairs, in order.

    Raises SettingsError for a malformed pair, an unknown setting, or a setting that decides the test tasks.
    """
    axes, problems = [], []
    for pair in pairs:
        key, equals, values = pair.partition("=")
        words = values.split(",")
        if not equals or not all(words):
            problems.append((f"--grid {pair} has no values", "write --grid inner_lr=0.1,0.4"))
        elif key not in FIELDS:
            hint = nearest(key, FIELDS, otherwise="list all settings with mamlctl train --print-config")
            problems.append((f"unknown setting '{key}' in --grid", hint))
        elif key == "seed":
            problems.append(("--grid cannot vary seed: the seeds of a row are separate runs", "use --seeds"))
        elif key in OF_TASKS:
            fact = f"--grid cannot vary {key}: rows of one table are tested on the same tasks"
            problems.append((fact, "make a table for each value"))
        else:
            axes.append([(key, word) for word in words])
    keys = [axis[0][0] for axis in axes]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        problems.append((f"--grid names {', '.join(repeated)} twice", "write all values in one --grid"))
    if problems:
        raise SettingsError(problems)
    return [_planned_row(choice) for choice in itertools.product(*axes)]


def _planned_row(choice: Sequence[tuple[str, str]]) -> PlannedRow:
    values = {key: _parsed_value(key, word) for key, word in choice}
    algo = values.pop("algo", None)
    name = ", ".join(word if key == "algo" else f"{key}={word}" for key, word in choice)
    return PlannedRow(name, None if algo is None else str(algo), values)


def _parsed_value(key: str, word: str) -> Any:
    """Parse a value as YAML, as --set does. Raises SettingsError if it is not valid."""
    from omegaconf import OmegaConf  # not at the top, as in presets.py

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={word}"]))[key]  # type: ignore[index,call-overload]
    except yaml_errors() as error:
        raise SettingsError([(f"--grid {key}={word} cannot be read", "write key=value,value")]) from error


def algorithm_rows(names: str) -> list[PlannedRow]:
    """A row per algorithm in a list such as "maml,fomaml". Raises SettingsError if one is repeated."""
    algos = [name.strip() for name in names.split(",") if name.strip()]
    if len(set(algos)) < len(algos) or not algos:
        raise SettingsError([(f"--algos is '{names}'", "name each algorithm once: --algos maml,maml++")])
    return [PlannedRow(algo, algo, {}) for algo in algos]


def _improvement_row(base: str, on: Collection[str], *, from_all: bool = False) -> PlannedRow:
    """The row of an algorithm with the improvements `on`.

    Its label adds them to the algorithm without improvements, or removes the others from the one with all of
    them (`from_all`), which may have a name of its own, as maml++ is maml with all improvements.
    """
    values = {name: name in on for name in IMPROVEMENTS}
    removed = tuple(name for name in IMPROVEMENTS if name not in on)
    improved = next((name for name, entry in ALGORITHMS.items() if entry.improves == base), None)
    if from_all or (improved and not removed):
        return PlannedRow(improved or f"{base} with all", improved or base, values, removed=removed)
    return PlannedRow(base, base, values, added=tuple(name for name in IMPROVEMENTS if name in on))


def _without_improvements(algo: str) -> str:
    """The name of an algorithm without its improvements: maml for maml++."""
    entry = ALGORITHMS.get(algo)
    return algo if entry is None or entry.improves is None else entry.improves


def improved_label(base: str, added: Collection[str], removed: Collection[str]) -> str:
    """A name with the improvements that are added and removed, e.g. "maml + msl" or "maml++ - ca".

    Args:
        base: the name of the algorithm.
        added: the improvements it has in addition.
        removed: the improvements that are switched off.
    """
    return "".join([base, *(f" + {name}" for name in added), *(f" - {name}" for name in removed)])


def _ordered(order: str) -> list[list[str]]:
    """Parse "msl-bnrs+bnwb" as [[msl], [bnrs, bnwb]]. Raises SettingsError for unknown or repeated names."""
    steps = [step.split("+") for step in order.split("-")]
    names = [*itertools.chain(*steps)]
    if unknown := [name for name in names if name not in IMPROVEMENTS]:
        hint = nearest(unknown[0], IMPROVEMENTS, otherwise=f"write it like {ORDER}")
        raise SettingsError([(f"--order names '{unknown[0]}', which is not an improvement", hint)])
    if len(set(names)) < len(names):
        raise SettingsError([(f"--order {order} names an improvement twice", f"write it like {ORDER}")])
    return steps


def as_unimproved(config: TrainConfig) -> TrainConfig:
    """The same settings under the name without improvements: maml++ becomes maml with its flags."""
    return replace(config, algo=_without_improvements(config.algo))


def label_of(config: TrainConfig) -> str:
    """The name of a run in the style of plans: its algorithm, and how its improvements differ from that."""
    if _without_improvements(config.algo) == config.algo:
        return improved_label(config.algo, config.improvements, ())
    return improved_label(config.algo, (), [name for name in IMPROVEMENTS if not getattr(config, name)])
