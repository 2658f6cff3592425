"""Merge settings from presets, files, `--set` and flags, and record the origin of each value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, nearest
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.rules import NOUNS, VALUE_TYPES, check, ineffective, limit_problems
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig

ConfigT = TypeVar("ConfigT", TrainConfig, EvalConfig)

Layer = tuple[str, Mapping[str, Any]]  # the origin of some settings, and their values
MISSING, INTERPOLATION = "???", "${"  # OmegaConf's placeholders
SURROGATES = re.compile("[\ud800-\udfff]")  # what Python decodes bytes to that are not UTF-8
COMMAND_LINE = ("flag", "--set")


@dataclass(frozen=True)
class Resolved(Generic[ConfigT]):
    """A configuration, and the origin of each field's value."""

    config: ConfigT
    sources: Mapping[str, str]


def merge(config_type: type[ConfigT], layers: Sequence[Layer]) -> tuple[Resolved[ConfigT], list[Problem]]:
    """Override the defaults of a settings class with the values of `layers`, weakest first.

    Returns:
        The settings, and a problem for each unknown name or value of the wrong type; those are skipped.
    """
    types = VALUE_TYPES[config_type]
    values: dict[str, Any] = {}
    sources, problems = dict.fromkeys(types, "default"), list[Problem]()
    for source, layer in layers:
        where = "on the command line" if source == "flag" else f"in {source}"
        for name, value in layer.items():
            if name not in types:
                place = "" if source == "--set" else f" {where}"
                hint = nearest(str(name), types, otherwise="list all settings with --print-config")
                problems.append((f"unknown setting '{name}'{place}", hint))
                continue
            try:
                read = types[name].read(value)
            except ValueError:
                noun = NOUNS[types[name].kind]
                problems.append((f"{name} is {value!r} {where}, which is not {noun}", f"use {noun}"))
                continue
            if isinstance(read, str) and (read == MISSING or INTERPOLATION in read):
                fact = f"{name} is {read!r} {where}, but OmegaConf's placeholders are not filled in"
                problems.append((fact, "write the value itself"))
                continue
            if isinstance(read, str) and SURROGATES.search(read):  # no YAML file can contain it
                problems.append((f"{name} is {read!r} {where}, which is not UTF-8", "rename that folder"))
                continue
            values[name], sources[name] = read, source
    return Resolved(config_type(**values), sources), problems


def drop_ineffective(
    resolved: Resolved[TrainConfig], forced: Mapping[str, Any] | None = None
) -> Resolved[TrainConfig]:
    """Reset settings from presets and files that a stronger layer made meaningless.

    Settings from the command line are kept, so that later checks refuse them.

    Args:
        resolved: the settings and their origins.
        forced: settings that can have only one value, and that value.
    """
    config = resolved.config
    values = dict(forced or {})
    values |= {name: value for name, (value, _) in ineffective(config).items()}
    changed = {
        name: value
        for name, value in values.items()
        if resolved.sources[name] not in COMMAND_LINE and getattr(config, name) != value
    }
    sources = {**resolved.sources, **dict.fromkeys(changed, "other settings")}
    return Resolved(replace(config, **changed), sources)


def stored_settings(source: str, values: Mapping[str, Any]) -> TrainConfig:
    """The settings of a file that contains all of them. Raises SettingsError if one is invalid."""
    resolved, problems = merge(TrainConfig, [(source, values)])
    config = drop_ineffective(resolved).config
    if problems := problems + check(config):
        raise SettingsError(problems)
    return config


def evaluation_settings(values: Mapping[str, Any], source: str) -> EvalConfig:
    """The settings of an evaluation. Raises SettingsError for unknown names, wrong types and limits."""
    resolved, problems = merge(EvalConfig, [(source, values)])
    if problems := problems + limit_problems(resolved.config):
        raise SettingsError(problems)
    return resolved.config


def fill_schedules(config: TrainConfig, data_set_defaults: Mapping[str, Any]) -> TrainConfig:
    """Derive the settings that are None; schedules scale with the epochs, so short runs keep their shape."""
    open_values: dict[str, Any] = {
        **data_set_defaults,
        "eval_inner_steps": config.inner_steps,
        "init_seed": config.seed,
        "train_seed": config.seed,
    }
    for name in config.improvements:
        companions = IMPROVEMENTS[name].companions
        open_values |= {companion: derive(config) for companion, derive in companions.items()}
    return replace(
        config, **{key: value for key, value in open_values.items() if getattr(config, key) is None}
    )
