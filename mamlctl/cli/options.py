"""Command-line options made from the fields of a settings class, or of a dataclass of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mamlctl.cli.common_options import started_models
from mamlctl.cli.help import show_everything
from mamlctl.core.errors import ExitCode
from mamlctl.core.files import expanded
from mamlctl.core.problems import variable
from mamlctl.data.sets import folder_layout
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.sets.facts import DataSet
from mamlctl.data.sets.registry import DATA_SETS, NAMES
from mamlctl.data.worlds import WORLDS
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.presets import preset_summaries
from mamlctl.settings.rules import LOSS_SUMMARIES, NETS, VALUE_TYPES


def _choices_by_data_set(choices_of: Callable[[DataSet], Sequence[str]]) -> str:
    choices = {name: choices_of(data_set) for name, data_set in DATA_SETS.items()}
    return "; ".join(f"{', '.join(words)} ({name})" for name, words in choices.items() if len(words) > 1)


def _data_set_summaries() -> dict[str, str]:
    return {name: entry.summary for table in (DATA_SETS, FAMILIES, WORLDS) for name, entry in table.items()}


# The lists of `mamlctl train --list`: names and what they mean.
LISTS: Mapping[str, Callable[[], Mapping[str, str]]] = {
    "presets": preset_summaries,
    "algorithms": lambda: {name: entry.summary for name, entry in ALGORITHMS.items()},
    "datasets": _data_set_summaries,
    "nets": lambda: NETS,
    "losses": lambda: LOSS_SUMMARIES,
}

# Setting -> the list of its names, which a shell completes.
LIST_OF_SETTING = {"algo": "algorithms", "dataset": "datasets", "net": "nets", "loss": "losses"}

# The choices of settings whose values are defined in tables above the schema.
FROM_TABLES = {
    "algo": f"One of {', '.join(ALGORITHMS)}.",
    "net": f"Names: {', '.join(NETS)}.",
    "dataset": f"Names: {', '.join(NAMES)}.",
    "split_scheme": f"One of {_choices_by_data_set(lambda data_set: data_set.split_schemes)}; "
    f"{', '.join(folder_layout.SPLIT_SCHEMES)} (a folder).",
    "resize": f"One of {_choices_by_data_set(lambda data_set: data_set.resizes)}.",
}


def with_options(
    options_type: type, settings_type: type | None = None, evaluation: Sequence[str] = ()
) -> Callable[[Callable[..., ExitCode]], Callable[..., ExitCode]]:
    """Give a command one option per field of one or two classes.

    Args:
        options_type: a dataclass of annotated options; the command gets an instance as `options`.
        settings_type: a settings class; the command gets the values from the command line as the dict
            `settings`.
        evaluation: fields of EvalConfig; the command gets their values from the command line as the dict
            `evaluation`.

    Returns:
        The decorator; the command that it returns has one keyword parameter per option. Its attribute
        `advanced` names the options that only --help-all shows: with test settings (`evaluation`) all
        training settings, which are in the help of train, otherwise those that few people change.
    """
    option_hints = get_type_hints(options_type, include_extras=True)
    # In the help of every command, inherited options come last.
    inherited_last = sorted(
        fields(options_type), key=lambda item: item.name not in options_type.__annotations__
    )
    options = [_parameter(item.name, item.default, option_hints[item.name]) for item in inherited_last]
    settings = [] if settings_type is None else _setting_parameters(settings_type)
    of_test = [item for item in _setting_parameters(EvalConfig) if item.name in evaluation]
    shown = () if settings_type is None or evaluation else _common(settings_type)
    advanced = frozenset(item.name for item in settings if item.name not in shown)

    def decorate(function: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
        hints = get_type_hints(function, include_extras=True)
        others = [
            _parameter(parameter.name, parameter.default, hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name not in ("options", "settings", "evaluation")
        ]
        others += options
        # Help shows panels in the order of their first option, so the settings come first.
        bare = [parameter for parameter in others if _panel_of(parameter) is None]
        bare += [HELP_ALL] if advanced else []
        parameters = [
            *bare,
            *settings,
            *of_test,
            *(other for other in others if _panel_of(other) is not None),
        ]

        @functools.wraps(function)
        def command(**values: Any) -> ExitCode:
            values = {name: _expanded(value) for name, value in values.items() if name != HELP_ALL.name}
            for name, group in (("settings", settings), ("evaluation", of_test)):
                if group:
                    flags = {item.name: values.pop(item.name) for item in group}
                    values[name] = {flag: value for flag, value in flags.items() if value is not None}
            values["options"] = options_type(**{option.name: values.pop(option.name) for option in options})
            return function(**values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.advanced = advanced  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _common(settings_type: type) -> set[str]:
    """The settings that people change most."""
    return {item.name for item in fields(settings_type) if item.metadata["common"]}


def _setting_parameters(settings_type: type) -> list[inspect.Parameter]:
    """One parameter per field of a settings class; None means that the option is not on the command line."""
    parameters = []
    for item in fields(settings_type):
        value_type = VALUE_TYPES[settings_type][item.name]
        help_text = _help_of(item, value_type.choices)
        option = typer.Option(
            help=help_text,
            rich_help_panel=item.metadata["panel"],
            show_default=False,
            autocompletion=_completion(item.name, value_type.choices),
        )
        parameters.append(_parameter(item.name, None, Annotated[value_type.kind | None, option]))
    return parameters


def _expanded(value: Any) -> Any:
    """The value of an option, with `~` in paths expanded, which shells do not do after '='."""
    if isinstance(value, list):
        return [*map(_expanded, value)]
    return expanded(value) if isinstance(value, Path) else value


def _parameter(name: str, default: object, annotation: object) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _completion(name: str, choices: Sequence[object]) -> Callable[..., list[Any]] | None:
    """A function that returns what a shell completes as the value of a setting, or None."""
    if name == "init":
        return started_models
    if name in LIST_OF_SETTING:
        return lambda: list(LISTS[LIST_OF_SETTING[name]]().items())
    return (lambda: [str(choice) for choice in choices]) if choices else None


HELP_ALL = _parameter(
    "help_all",
    False,
    Annotated[
        bool,
        typer.Option(
            "--help-all",
            help="Show this message with all options and exit.",
            is_eager=True,
            expose_value=False,
            callback=show_everything,
        ),
    ],
)


def _help_of(item: Field[Any], choices: Sequence[object]) -> str:
    """The help of a setting, its choices, its default unless that is "off" or in the help, its variable."""
    parts = [item.metadata["help"]]
    if item.name in FROM_TABLES:
        parts.append(FROM_TABLES[item.name])
    if choices:
        parts.append(f"One of {', '.join(map(str, choices))}.")
    if item.default is not None and item.default is not False:
        parts.append(f"Default: {item.default}.")
    if item.metadata["variable"]:
        parts.append(f"Variable: {variable(item.name)}.")
    return " ".join(parts)


def _panel_of(parameter: inspect.Parameter) -> str | None:
    """The help panel of an option; None for an argument or a general option."""
    return next((getattr(note, "rich_help_panel", None) for note in parameter.annotation.__metadata__), None)
