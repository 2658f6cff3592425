"""Settings from presets, files, `--set` and flags, laid over each other; each value knows its layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, nearest
from mamlctl.settings.rules import NOUNS, VALUE_TYPES, check, ineffective, limit_problems
from mamlctl.settings.schema import IMPROVEMENTS, EvalConfig, TrainConfig

ConfigT = TypeVar("ConfigT", TrainConfig, EvalConfig)

Layer = tuple[str, Mapping[str, Any]]  # where settings come from, and what they are
COMMAND_LINE = ("flag", "--set")


@dataclass(frozen=True)
class Resolved(Generic[ConfigT]):
    """A configuration and, for each field, the layer that its value came from."""

    config: ConfigT
    sources: Mapping[str, str]


def merge(config_type: type[ConfigT], layers: Sequence[Layer]) -> tuple[Resolved[ConfigT], list[Problem]]:
    """Lay `layers`, weakest first, over the defaults of a settings class.

    Returns: The settings, and the problems: unknown names and values of the wrong type, which are left out.
    """
    types = VALUE_TYPES[config_type]
    values: dict[str, Any] = {}
    sources, problems = dict.fromkeys(types, "default"), list[Problem]()
    for source, layer in layers:
        for name, value in layer.items():
            if name not in types:
                place = "" if source == "--set" else f" in {source}"
                hint = nearest(str(name), types, otherwise="--print-config shows them all")
                problems.append((f"unknown setting '{name}'{place}", hint))
                continue
            try:
                values[name] = types[name].read(value)
                sources[name] = source
            except ValueError:
                noun = NOUNS[types[name].kind]
                problems.append((f"{name} is {value!r} in {source}, which is not {noun}", f"make it {noun}"))
    return Resolved(config_type(**values), sources), problems


def drop_ineffective(
    resolved: Resolved[TrainConfig], forced: Mapping[str, Any] | None = None
) -> Resolved[TrainConfig]:
    """Drop what a preset or file says that a stronger layer made meaningless; flags stay, to be refused.

    `forced`: settings that can have one value only.
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
    """The settings of a file that has all of them, so that no other defaults count. Raises SettingsError."""
    resolved, problems = merge(TrainConfig, [(source, values)])
    config = drop_ineffective(resolved).config
    if problems := problems + check(config):
        raise SettingsError(problems)
    return config


def evaluation_settings(values: Mapping[str, Any], source: str) -> EvalConfig:
    """The settings of a test. Raises SettingsError for unknown ones, wrong types and limits."""
    resolved, problems = merge(EvalConfig, [(source, values)])
    if problems := problems + limit_problems(resolved.config):
        raise SettingsError(problems)
    return resolved.config


def fill_schedules(config: TrainConfig, data_set_defaults: Mapping[str, Any]) -> TrainConfig:
    """Fill what was left open: schedules from the epochs, so that short runs keep their shape."""
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
