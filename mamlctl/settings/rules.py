"""Validation rules for single settings and combinations; each problem comes with a hint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from mamlctl.core.formatting import parse_seconds
from mamlctl.core.literals import BUILT_IN_NETS, LOSSES, TORCHVISION_NETS
from mamlctl.core.problems import Problem, flag, nearest
from mamlctl.core.user_code.references import EXAMPLES, SUFFIX, Reference, is_reference
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS, TrainConfig

# Setting -> the improvement without which it has no effect.
COMPANIONS = {
    name: improvement.name for improvement in IMPROVEMENTS.values() for name in improvement.companions
}

# The networks of --net.
NETS: Mapping[str, str] = {
    "conv4": "four blocks of a 3x3 convolution, batch norm, an activation and pooling, then a linear head",
    "mlp": "linear layers with an activation each and, on images, batch norm; the network of curves",
    "resnet12": "four residual blocks of three 3x3 convolutions each, with batch norm, then a linear head",
} | dict.fromkeys(TORCHVISION_NETS, "a classifier of torchvision, with random weights")

# The built-in losses of --loss.
LOSS_SUMMARIES: Mapping[str, str] = {
    "cross_entropy": "minus the logarithm of the correct class's probability; the default for images",
    "mse": "mean squared error; the default for curves and tables",
    "mae": "mean absolute error, for curves and tables",
    "huber": "quadratic up to an error of 1 and linear beyond, for curves and tables",
}

# Setting -> the networks that use it.
OF_NETS = {
    "filters": ("conv4", "resnet12"),
    "hidden": ("mlp",),
    "pooling": ("conv4",),
    "conv": ("conv4",),
    "readout": ("conv4",),
    "activation": ("conv4", "mlp"),
}

# Settings of gradient steps, which a step inside a trust region is not.
OF_GRADIENT_STEPS = ("meta_lr", "meta_lr_final", "ca", "adam_beta1", "adam_beta2", "clip_value", "clip_norm")

# The name of each type in messages.
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class ValueType:
    """The type of a setting."""

    kind: type  # bool, int, float or str
    optional: bool  # whether None is allowed
    choices: tuple[object, ...]  # the allowed values; empty if there is no closed set

    def read(self, value: Any) -> Any:
        """The value converted to this type, e.g. "7" to 7. Raises ValueError if that is not possible."""
        if value is None and not self.optional:
            raise ValueError(value)
        import omegaconf  # not at the top: importing it takes as long as Typer, and help does not need it

        nodes: Mapping[type, Callable[[], omegaconf.ValueNode]] = {
            bool: omegaconf.BooleanNode,
            int: omegaconf.IntegerNode,
            float: omegaconf.FloatNode,
            str: omegaconf.StringNode,
        }
        try:
            return nodes[self.kind]().validate_and_convert(value)
        except OverflowError as error:  # an integer beyond the largest float
            raise ValueError(value) from error


def _value_types(config_type: type) -> Mapping[str, ValueType]:
    types = {}
    for name, hint in get_type_hints(config_type).items():
        optional = NoneType in get_args(hint)
        kind = get_args(hint)[0] if optional else hint
        choices = get_args(kind)
        types[name] = ValueType(type(choices[0]) if choices else kind, optional, choices)
    return types


# Settings class -> the types of its settings.
VALUE_TYPES: Mapping[type, Mapping[str, ValueType]] = {
    config_type: _value_types(config_type) for config_type in (TrainConfig, EvalConfig)
}


def ineffective(config: TrainConfig) -> dict[str, tuple[Any, Problem]]:
    """Settings that have no effect with these others -> the only allowed value, and the problem otherwise."""
    settings: dict[str, tuple[Any, Problem]] = {}
    for name, switch in COMPANIONS.items():
        if not getattr(config, switch):
            fact = f"{flag(name)} has no effect without {flag(switch)}"
            settings[name] = None, (fact, f"add {flag(switch)}, or leave it out")
    for name, nets in OF_NETS.items():
        if config.net not in nets:
            fact = f"{flag(name)} has no effect with --net {config.net}"
            settings[name] = FIELDS[name].default, (fact, "leave it out")
    if config.net in BUILT_IN_NETS:
        settings["head"] = None, (f"--head has no effect with --net {config.net}", "leave it out")
    if config.init is None:
        settings["init_skip"] = None, ("--init-skip has no effect without --init", "leave it out")
    if config.adapts == "body":
        fact = "--body-epochs has no effect with --adapts body: they train a body for a head that adapts"
        settings["body_epochs"] = 0, (fact, "leave it out")
    if config.outer == "trpo":
        for name in OF_GRADIENT_STEPS:
            fact = f"{flag(name)} has no effect with --outer trpo, which decides the size of a step itself"
            settings[name] = FIELDS[name].default, (fact, "leave it out, or use --outer pg")
    elif config.outer == "pg":
        fact = "--max-kl has no effect with --outer pg"
        settings["max_kl"] = None, (fact, "leave it out, or use --outer trpo")
    if config.ca:
        fact = "--meta-lr-final and --ca both schedule the meta learning rate"
        settings["meta_lr_final"] = None, (fact, "use --no-ca, or leave out --meta-lr-final")
    return settings


def check(config: TrainConfig) -> list[Problem]:
    """Every problem of the settings, alone and in combination."""
    problems = limit_problems(config)
    problems += [
        problem for name, (value, problem) in ineffective(config).items() if getattr(config, name) != value
    ]
    if config.hidden is not None and not all(
        width.isdecimal() and int(width) for width in config.hidden.split("-")
    ):
        problems.append(
            (
                f"--hidden is {config.hidden!r}, which is not a list of widths",
                "write widths like 256-128-64-64",
            )
        )
    for name in ("discount", "gae"):
        if (value := getattr(config, name)) is not None and value > 1:
            problems.append((f"{flag(name)} is {value:g}, but the maximum is 1", "use 1 or less"))
    try:
        parse_seconds(config.checkpoint_every)
    except ValueError as error:
        problems.append((f"--checkpoint-every {error}", "write 90s, 9m or 1h30m"))
    problems += _net_problems(config) + _loss_problems(config)
    if config.net == "mlp" and config.precision == "bf16":
        problems.append(("--precision bf16 has no effect without convolutions", "use float32"))
    if config.conv == "winograd" and config.precision in ("bf16", "tf32"):
        fact = f"--conv winograd has no effect with --precision {config.precision}"
        problems.append((fact, "use --precision float32, or --conv auto"))
    if config.conv == "winograd" and config.engine == "plain":
        fact = "--conv winograd has no effect with --engine plain, which convolves by torch's operations"
        problems.append((fact, "use --engine adjoint, or --conv auto"))
    if config.train_shots is not None and config.train_shots < config.shots:
        fact = f"--train-shots {config.train_shots} is below --shots {config.shots}"
        problems.append((fact, f"use --train-shots {config.shots} or more"))
    if config.msl and config.inner_steps < 2:
        fact = f"--msl needs 2 inner steps or more, but --inner-steps is {config.inner_steps}"
        problems.append((fact, "use --inner-steps 2 or more, or add --no-msl"))
    if config.da and config.first_order:
        problems.append(
            (
                "--da has no effect with --first-order: training never becomes second order",
                "use --no-da or --no-first-order",
            )
        )
    if config.clip_value is not None and config.clip_norm is not None:
        problems.append(("--clip-value and --clip-norm are both given", "remove one"))
    if config.min_meta_lr is not None and config.min_meta_lr > config.meta_lr:
        problems.append(
            (
                f"--min-meta-lr {config.min_meta_lr:g} is above --meta-lr {config.meta_lr:g}",
                "lower --min-meta-lr",
            )
        )
    if config.task_chunk != "auto" and not (config.task_chunk.isdecimal() and int(config.task_chunk)):
        problems.append(
            (
                f"--task-chunk is {config.task_chunk!r}, which is not a number of tasks",
                "use auto, or 1 or more",
            )
        )
    if 0 < config.epochs <= config.body_epochs:
        fact = f"--body-epochs {config.body_epochs} leaves no epoch of {config.epochs} for the inner loop"
        problems.append((fact, f"use --body-epochs {config.epochs - 1} or fewer"))
    if config.da_epochs is not None and config.da_epochs > config.epochs:
        problems.append(
            (
                f"--da-epochs {config.da_epochs} is more than --epochs {config.epochs}",
                f"use --da-epochs {config.epochs}, or --no-da and --first-order",
            )
        )
    return problems


def _net_problems(config: TrainConfig) -> list[Problem]:
    """An unknown network, or an arithmetic that only some networks have."""
    if config.net not in NETS and not is_reference(config.net):
        return [_unknown("network", "--net", config.net, NETS)]
    if config.precision == "bf16" and config.net not in BUILT_IN_NETS:
        fact = f"--precision bf16 is not available with --net {config.net}: only our convolutions support it"
        return [(fact, "use float32, or tf32 on a CUDA device")]
    return []


def _loss_problems(config: TrainConfig) -> list[Problem]:
    """An unknown loss."""
    if config.loss is None or config.loss in LOSSES or is_reference(config.loss):
        return []
    return [_unknown("loss", "--loss", config.loss, LOSSES)]


def _unknown(what: str, option: str, value: str, known: Iterable[str]) -> Problem:
    """The problem of a value that is neither a known name nor names the user's function."""
    example = EXAMPLES[option]
    if value.endswith(SUFFIX):
        function = Reference.parse(example).name
        return f"{option} is {value}, without a function", f"write {value}:{function}, with its name"
    otherwise = f"use one of {', '.join(known)}, or {example} with your own function"
    return f"unknown {what} '{value}'", nearest(value, known, otherwise=otherwise)


def limit_problems(config: TrainConfig | EvalConfig) -> list[Problem]:
    """A problem for each setting outside its choices or limits."""
    types = VALUE_TYPES[type(config)]
    problems = (
        _choice_problem(item.name, getattr(config, item.name), types[item.name].choices)
        or _limit_problem(item, getattr(config, item.name))
        for item in fields(config)
        if getattr(config, item.name) is not None
    )
    return [problem for problem in problems if problem]


def _choice_problem(name: str, value: Any, choices: tuple[object, ...]) -> Problem | None:
    if not choices or value in choices:
        return None
    words = [str(choice) for choice in choices]
    fact = f"{flag(name)} is {value!r}, which is not one of {', '.join(words)}"
    return fact, nearest(str(value), words, otherwise="use one of these")


def _limit_problem(item: Field[Any], value: Any) -> Problem | None:
    limits = item.metadata["limits"]
    fact = f"{flag(item.name)} is {value}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{fact}, which is not a finite number", "use a finite number"
    if limits.least is not None and value < limits.least:
        return f"{fact}, but the minimum is {limits.least}", f"use {limits.least} or more"
    if limits.above is not None and value <= limits.above:
        return f"{fact}, but it must be above {limits.above}", f"use more than {limits.above}"
    if limits.below is not None and value >= limits.below:
        return f"{fact}, but it must be below {limits.below}", f"use less than {limits.below}"
    return None
