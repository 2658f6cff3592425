"""Options that commands share, and what each of them means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from mamlctl.core.problems import Problem, flag
from mamlctl.display.console import write_json
from mamlctl.display.displays import Display, open_display
from mamlctl.settings.fields import HARDWARE, OUTPUT
from mamlctl.settings.merge import Layer
from mamlctl.settings.presets import load_file, load_preset, parse_sets, preset_names

Result = TypeVar("Result")


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option with its help panel and text; `names`: only where they are not those of the field."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True)
class OutputOptions:
    """What every command takes."""

    offline: Annotated[
        bool, option(HARDWARE, "Never download; a missing data set ends with exit 3.", "--offline")
    ] = False
    json: Annotated[bool, option(OUTPUT, "One JSON document on stdout.", "--json")] = False
    quiet: Annotated[bool, option(OUTPUT, "No progress on stderr.", "--quiet")] = False

    def by_flag(self, *names: str) -> dict[str, object]:
        """The values of options, by their flags."""
        return {flag(name): getattr(self, name) for name in names}

    def display(self) -> Display:
        """Where events go while the command works."""
        return open_display(Console(stderr=True), quiet=self.quiet)

    def write(
        self, result: Result, document: Mapping[str, Any], show: Callable[[Console, Result], None]
    ) -> None:
        """The command's result on stdout: its document with --json, else as `show` prints it."""
        if self.json:
            write_json(sys.stdout, document)
        else:
            show(Console(), result)


@dataclass(frozen=True)
class SettingsOptions(OutputOptions):
    """Where settings of training come from, beside their own flags."""

    preset: Annotated[
        str | None,
        option(
            None,
            "Settings that ship with mamlctl, such as omniglot-20w1s-maml++, paper/... or official/...",
            autocompletion=preset_names,
        ),
    ] = None
    config: Annotated[Path | None, option(None, "YAML file of settings, such as a run's config.yaml.")] = None
    set_: Annotated[list[str] | None, option(None, "Any setting as key=value; repeatable.", "--set")] = None

    def file_layers(self) -> list[Layer]:
        """The settings of the preset and the file. Raises SettingsError for what cannot be read."""
        layers: list[Layer] = []
        if self.preset is not None:
            layers.append((f"preset {self.preset}", load_preset(self.preset)))
        if self.config is not None:
            layers.append((str(self.config), load_file(self.config)))
        return layers

    def set_values(self) -> dict[str, Any]:
        """The settings given with --set. Raises SettingsError for what cannot be read."""
        return parse_sets(self.set_ or [])


def unused(options: Mapping[str, object], why: str, way: str = "leave it out") -> list[Problem]:
    """Those of the options that were given, which have no effect: (fact, way out) pairs."""
    return [
        (f"{name} has no effect {why}", way)
        for name, value in options.items()
        if value is not None and value is not False
    ]
