"""The rules that settings keep, alone and with each other; every problem is told with its way out."""

from __future__ import annotations

import math
from dataclasses import Field, fields
from typing import Any

from mamlctl.core.problems import Problem, flag, nearest
from mamlctl.settings.schema import FIELDS, EvalConfig, TrainConfig

# A setting that only its switch gives a meaning to.
NEEDS = {"msl_epochs": "msl", "da_epochs": "da", "min_meta_lr": "ca"}

# A setting that only some networks have.
OF_NETS = {
    "filters": ("conv4", "resnet12"),
    "hidden": ("mlp",),
    "pooling": ("conv4",),
    "readout": ("conv4",),
    "activation": ("conv4", "mlp"),
}


def check(config: TrainConfig) -> list[Problem]:
    """Every rule that the settings break, by themselves and with each other."""
    problems = limit_problems(config)
    for name, switch in NEEDS.items():
        if getattr(config, name) is not None and not getattr(config, switch):
            problems.append(
                (f"{flag(name)} has no effect without {flag(switch)}", f"add {flag(switch)} or leave it out")
            )
    for name, nets in OF_NETS.items():
        if getattr(config, name) != FIELDS[name].default and config.net not in nets:
            problems.append((f"{flag(name)} has no effect with --net {config.net}", "leave it out"))
    if config.hidden is not None and not all(
        width.isdecimal() and int(width) for width in config.hidden.split("-")
    ):
        problems.append((f"--hidden is {config.hidden!r}", "write widths like 256-128-64-64"))
    if config.net == "mlp" and config.precision == "bf16":
        problems.append(("--precision bf16 has no effect without convolutions", "use float32"))
    if config.train_shots is not None and config.train_shots < config.shots:
        fact = f"--train-shots {config.train_shots} is below --shots {config.shots}"
        problems.append((fact, f"use --train-shots {config.shots} or more"))
    if config.meta_lr_final is not None and config.ca:
        problems.append(("--meta-lr-final and --ca both move the meta learning rate", "leave one out"))
    if config.msl and config.inner_steps < 2:
        problems.append(
            (f"--msl weighs several inner steps, but --inner-steps is {config.inner_steps}", "add --no-msl")
        )
    if config.da and config.first_order:
        problems.append(
            ("--da has no effect with --first-order: there is no second order to come", "leave one out")
        )
    if config.clip_value is not None and config.clip_norm is not None:
        problems.append(("--clip-value and --clip-norm are both given", "leave one out"))
    if config.min_meta_lr is not None and config.min_meta_lr > config.meta_lr:
        problems.append(
            (f"--min-meta-lr {config.min_meta_lr:g} is above --meta-lr {config.meta_lr:g}", "lower it")
        )
    if config.task_chunk != "auto" and not (config.task_chunk.isdecimal() and int(config.task_chunk)):
        problems.append(
            (f"--task-chunk is {config.task_chunk!r}", "use auto, or a number of tasks from 1 on")
        )
    if config.da_epochs is not None and config.da_epochs > config.epochs:
        problems.append(
            (f"--da-epochs {config.da_epochs} is more than --epochs {config.epochs}", "use --first-order")
        )
    return problems


def limit_problems(config: TrainConfig | EvalConfig) -> list[Problem]:
    """The limits of single fields that the settings break."""
    found = (_problem_of_limits(item, getattr(config, item.name)) for item in fields(config))
    return [problem for problem in found if problem]


def _problem_of_limits(item: Field[Any], value: Any) -> Problem | None:
    name, limits = item.name, item.metadata
    if value is None:
        return None
    if limits["choices"] and value not in limits["choices"]:
        words = ", ".join(str(choice) for choice in limits["choices"])
        return f"{flag(name)} is {value!r}, but it can only be one of {words}", nearest(
            str(value), [str(choice) for choice in limits["choices"]], otherwise=f"use one of {words}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return f"{flag(name)} is {value}, which is not a finite number", "use a finite number"
    if limits["least"] is not None and value < limits["least"]:
        return (
            f"{flag(name)} is {value}, but the least is {limits['least']}",
            f"use {limits['least']} or more",
        )
    if limits["above"] is not None and value <= limits["above"]:
        return (
            f"{flag(name)} is {value}, but it must be above {limits['above']}",
            f"use more than {limits['above']}",
        )
    if limits["below"] is not None and value >= limits["below"]:
        return (
            f"{flag(name)} is {value}, but it must be below {limits['below']}",
            f"use less than {limits['below']}",
        )
    return None
