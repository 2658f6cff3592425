"""Where settings come from: presets, files, `--set` and flags, laid over each other, each with its origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, nearest
from mamlctl.settings.rules import NEEDS, OF_NETS, check, limit_problems
from mamlctl.settings.schema import FIELDS, EvalConfig, TrainConfig

Layer = tuple[str, Mapping[str, Any]]  # where settings come from, and what they are

COMMAND_LINE = ("flag", "--set")


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each field, the layer that its value came from."""

    config: TrainConfig
    sources: Mapping[str, str]


def resolve(
    layers: Sequence[Layer],
    implied: Callable[[Sequence[Layer]], list[Layer]],
    more_problems: Callable[[TrainConfig, Mapping[str, str]], list[Problem]] = lambda config, sources: [],
    forced: Callable[[TrainConfig], Mapping[str, Any]] = lambda config: {},
    *,
    checked: bool = True,
) -> Resolved:
    """Lay `layers` (name, values), weakest first, over the dataclass's defaults.

    `implied`: the layers with those that follow from what they say, such as an algorithm's defaults.
    `more_problems` gets the settings and where each comes from. `forced`: settings that can have one value
    only; where a preset or file has another it gives way, while a flag is refused.
    `checked`: without it, settings may break rules that a further layer would mend. Raises SettingsError with
    every problem found: unknown keys, wrong types, limits, rules between fields.
    """
    problems: list[Problem] = []
    try:
        stack = implied(layers)
    except SettingsError as error:
        problems += error.problems
        stack = list(layers)
    merged = OmegaConf.structured(TrainConfig)
    OmegaConf.set_readonly(merged, False)  # it takes that over from the frozen dataclass
    sources = dict.fromkeys(FIELDS, "default")
    for source, values in stack:
        for key, value in values.items():
            problem = _set(merged, source, str(key), value)
            if problem:
                problems.append(problem)
            else:
                sources[key] = source
    config = TrainConfig(**{str(key): value for key, value in merged.items()})
    config = drop_ineffective(config, sources, forced)
    if checked:
        problems += check(config) + more_problems(config, sources)
    if problems:
        raise SettingsError(problems)
    return Resolved(config, sources)


def evaluation_settings(values: Mapping[str, Any], source: str) -> EvalConfig:
    """The settings of a test. Raises SettingsError for unknown ones, wrong types and limits."""
    merged = OmegaConf.structured(EvalConfig)
    OmegaConf.set_readonly(merged, False)
    known = {item.name: item for item in fields(EvalConfig)}
    problems = [_set(merged, source, key, value, known) for key, value in values.items()]
    settings = EvalConfig(**{str(key): value for key, value in merged.items()})
    if found := [problem for problem in problems if problem] or limit_problems(settings):
        raise SettingsError(found)
    return settings


def _set(
    merged: DictConfig, source: str, key: str, value: Any, known: Mapping[str, Field[Any]] = FIELDS
) -> Problem | None:
    """Give a setting its value -> None, or why not."""
    if key not in known:
        place = "" if source == "--set" else f" in {source}"
        return f"unknown setting '{key}'{place}", nearest(
            key, known, otherwise="--print-config shows them all"
        )
    try:
        OmegaConf.update(merged, key, value)
    except OmegaConfBaseException:
        wanted = str(known[key].type).replace(" | None", "")
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}[
            wanted
        ]
        return f"{key} is {value!r} in {source}, which is not {wanted}", f"make it {wanted}"
    return None


def drop_ineffective(
    config: TrainConfig, sources: dict[str, str], forced: Callable[[TrainConfig], Mapping[str, Any]]
) -> TrainConfig:
    """Drop what a preset or file says that a stronger layer made meaningless; flags are refused."""
    values = dict(forced(config))
    values |= {name: None for name, switch in NEEDS.items() if not getattr(config, switch)}
    values |= {name: FIELDS[name].default for name, nets in OF_NETS.items() if config.net not in nets}
    if config.ca:
        values["meta_lr_final"] = None
    changed = {
        name: value
        for name, value in values.items()
        if sources[name] not in COMMAND_LINE and getattr(config, name) != value
    }
    sources.update(dict.fromkeys(changed, "other settings"))
    return replace(config, **changed)
