"""The environment variables: defaults of some settings, and the folder of runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import expanded
from mamlctl.core.problems import flag, variable
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import Layer
from mamlctl.settings.schema import TrainConfig

RUNS = variable("runs")  # the folder of runs; unlike the others, no setting of a run


def variable_values(settings_type: type[TrainConfig] | type[EvalConfig]) -> dict[str, str]:
    """The settings that have a value in an environment variable; a blank variable counts as not set."""
    names = [item.name for item in fields(settings_type) if item.metadata["variable"]]
    return {name: value for name in names if (value := os.environ.get(variable(name), "")).strip()}


def variable_layers(settings_type: type[TrainConfig] | type[EvalConfig]) -> list[Layer]:
    """A layer of settings, named after its variable, for each variable that is set."""
    return [(variable(name), {name: value}) for name, value in variable_values(settings_type).items()]


def without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a command whose settings are all in its arguments or in its run folder."""
    names = {variable(item.name) for item in fields(TrainConfig) if item.metadata["variable"]}
    return {name: value for name, value in environment.items() if name not in names}


def origin(name: str, value: str) -> str:
    """What an error blames for a wrong value: the variable of the setting if that has it, or the flag."""
    return variable(name) if os.environ.get(variable(name)) == value else flag(name)


def runs_folder() -> Path:
    """The folder with the run folders that have no --out. Raises SettingsError if MAMLCTL_RUNS is a file."""
    chosen = os.environ.get(RUNS, "")
    if not chosen.strip():
        return Path("runs")
    folder = expanded(chosen)
    if folder.exists() and not folder.is_dir():
        raise SettingsError([(f"{RUNS} is {chosen}, which is a file, not a folder", "name a folder")])
    return folder
