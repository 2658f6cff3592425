"""Command lines that reproduce settings, as single lines and as a SLURM script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from mamlctl.core.problems import flag
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.rules import per_step_settings
from mamlctl.data.sets.registry import has_classes, is_image_folder
from mamlctl.experiments.grid.grid import Grid, GridCell
from mamlctl.experiments.settings import resolve_settings
from mamlctl.run_folder import CONFIG
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig


def train_arguments(config: TrainConfig) -> tuple[str, ...]:
    """The shortest arguments of `mamlctl train` that result in these settings."""
    leading = {"algo": config.algo, "dataset": config.dataset, "ways": config.ways, "shots": config.shots}
    if not has_classes(config):
        del leading["ways"]
    if names_tasks(config.dataset):
        leading["task_type"] = config.task_type
    if is_image_folder(config.dataset):  # always named, so that files added later do not change the classes
        leading["classes"] = config.classes
    if config.net != TrainConfig.net:
        leading["net"] = config.net
    defaults = asdict(resolve_settings([("flag", leading)], checked=False).config)
    differing = {name: value for name, value in asdict(config).items() if defaults[name] != value}
    return settings_arguments({**leading, **differing})


def settings_arguments(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags for these values of settings."""
    return tuple(word for name, value in values.items() for word in _flag_words(name, value))


def _flag_words(name: str, value: Any) -> list[str]:
    if value is None:  # no flag removes a default of the algorithm or the data set
        return ["--set", f"{name}=null"]
    if isinstance(value, bool):
        return [flag(name) if value else flag("no_" + name)]
    return [flag(name), str(value)]


def cell_lines(grid: Grid) -> list[str]:
    """A shell line per cell, which trains or resumes the cell and tests it."""
    return [_cell_line(cell, cell_test(cell, grid.test)) for cell in grid.cells]


def cell_test(cell: GridCell, evaluate: EvalConfig) -> tuple[str, ...]:
    """The arguments of `mamlctl eval` for the grid's test of a cell, on the device of its training."""
    test = per_step_settings(evaluate, cell.config)
    test = replace(test, device=cell.config.device, data_root=cell.config.data_root)
    values = {item.name: (getattr(test, item.name), item.default) for item in fields(test)}
    return settings_arguments(
        {name: value for name, (value, default) in values.items() if name == "tasks" or value != default}
    )


def _cell_line(cell: GridCell, evaluate: Sequence[str]) -> str:
    folder = os.path.relpath(cell.folder)
    train = shlex.join(["mamlctl", "train", *train_arguments(cell.config), "--out", folder])
    resume = shlex.join(["mamlctl", "train", "--resume", folder])
    test = shlex.join(["mamlctl", "eval", folder, *evaluate])
    # A queue may restart a job that it has stopped.
    has_begun = f"[ -e {shlex.quote(folder)}/{CONFIG} ]"
    return f"if {has_begun}; then {resume}; else {train}; fi && {test}"


def slurm_script(name: str, commands: Sequence[str]) -> str:
    """A SLURM array job with one command per task.

    It leaves time, memory and partition to the options of sbatch.
    """
    name = re.sub(r"[^\w.+-]", "_", name)
    lines = "\n".join(f"  {shlex.quote(command)}" for command in commands)
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --ntasks=1
#SBATCH --output={name}-%a.log
commands=(
{lines}
)
eval "${{commands[$SLURM_ARRAY_TASK_ID]}}"
"""
