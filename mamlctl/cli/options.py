"""Command-line options made from the fields of a settings class, or of a dataclass of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from mamlctl.core.errors import ExitCode
from mamlctl.data.sets import image_folder
from mamlctl.data.sets.registry import DATA_SETS, NAMES, DataSet
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.settings.rules import VALUE_TYPES


def _choices_by_data_set(choices_of: Callable[[DataSet], Sequence[str]]) -> str:
    choices = {name: choices_of(data_set) for name, data_set in DATA_SETS.items()}
    return "; ".join(f"{name}: {', '.join(words)}" for name, words in choices.items() if len(words) > 1)


# What a setting can be where only a table above the schema knows it.
FROM_TABLES = {
    "algo": f"One of {', '.join(ALGORITHMS)}.",
    "dataset": f"Names: {', '.join(NAMES)}.",
    "split_scheme": f"{_choices_by_data_set(lambda data_set: data_set.split_schemes)}; "
    f"a folder: {', '.join(image_folder.SPLIT_SCHEMES)}.",
    "resize": f"{_choices_by_data_set(lambda data_set: data_set.resizes)}.",
}


def with_settings(config_type: type) -> Callable[[Callable[..., ExitCode]], Callable[..., ExitCode]]:
    """Give a command one option per field of a settings class; those given reach it as the dict `given`."""
    types = VALUE_TYPES[config_type]
    options = []
    for item in fields(config_type):
        help_text = _help_of(item, types[item.name].choices)
        option = typer.Option(help=help_text, rich_help_panel=item.metadata["panel"], show_default=False)
        kind = types[item.name].kind
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        options.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    names = [item.name for item in fields(config_type)]

    def decorate(function: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
        own = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        others = [
            parameter.replace(annotation=own[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name != "given"
        ]
        # Help shows panels in the order of their first option, and those of the settings come first.
        others.sort(key=lambda parameter: _panel_of(parameter) is not None)
        without_panel = sum(_panel_of(parameter) is None for parameter in others)

        @functools.wraps(function)
        def command(**values: Any) -> ExitCode:
            given = {name: value for name in names if (value := values.pop(name)) is not None}
            return function(given=given, **values)

        parameters = [*others[:without_panel], *options, *others[without_panel:]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def with_options(options_type: type) -> Callable[[Callable[..., ExitCode]], Callable[..., ExitCode]]:
    """Give a command one option per field of a dataclass of annotated ones; they reach it as `options`."""
    hints = get_type_hints(options_type, include_extras=True)
    names = [item.name for item in fields(options_type)]

    def decorate(function: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
        own = get_type_hints(function, include_extras=True)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            parameter.replace(annotation=own[parameter.name], kind=kind)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name != "options"
        ]
        parameters += [
            inspect.Parameter(item.name, kind, default=item.default, annotation=hints[item.name])
            for item in fields(options_type)
        ]

        @functools.wraps(function)
        def command(**values: Any) -> ExitCode:
            options = options_type(**{name: values.pop(name) for name in names})
            return function(options=options, **values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _help_of(item: Field[Any], choices: Sequence[object]) -> str:
    """A setting's help, what it can be, and its default unless that is "off" or described in the help."""
    parts = [item.metadata["help"]]
    if item.name in FROM_TABLES:
        parts.append(FROM_TABLES[item.name])
    if choices:
        parts.append(f"One of {', '.join(map(str, choices))}.")
    if item.default is not None and item.default is not False:
        parts.append(f"Default: {item.default}.")
    return " ".join(parts)


def _panel_of(parameter: inspect.Parameter) -> str | None:
    """The help panel that a command's own option asks for; none for an argument or a general option."""
    return next((getattr(note, "rich_help_panel", None) for note in parameter.annotation.__metadata__), None)
